"""Entry point of `python -m qlora` and `accelerate launch -m qlora`."""

from qlora.cli import main

if __name__ == "__main__":
    main()

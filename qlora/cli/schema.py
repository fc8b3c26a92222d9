"""`qlora schema`: what an editor needs to complete and check a recipe."""

from qlora.cli.app import answer, app


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe.

    Example: qlora schema > recipe.schema.json
    """
    from qlora.recipe.recipe import schema as recipe_schema

    answer(recipe_schema())

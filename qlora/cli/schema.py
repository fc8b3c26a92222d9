"""`qlora schema`: the JSON schema of a recipe, for completion and checks in an editor."""

from qlora.cli.app import app, print_json


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe.

    Example: qlora schema > recipe.schema.json
    """
    from qlora.recipe.recipe import schema as recipe_schema

    print_json(recipe_schema())

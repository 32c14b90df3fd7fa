"""forky image build, ls, rm, inspect."""

from typing import TYPE_CHECKING, Annotated

import typer

from forkypig.cli import documents, printing, sizes
from forkypig.cli.arguments import ImageName
from forkypig.cli.progress import Display
from forkypig.cli.runtime import connected

if TYPE_CHECKING:
    from forkypig.sdk.client import Forky

app = typer.Typer(help="Build, list and remove images.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def build(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Its name.", show_default="debian-12")] = "",
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Even if one of the same recipe is there.")] = False,
    as_json: printing.Json = False,
) -> None:
    """Build the default image, once; it takes about a minute."""

    async def work(forky: "Forky") -> None:
        display = Display()
        with display:
            image = await forky.build_image(name, rebuild=rebuild, on_progress=display.on_progress)
        if as_json:
            printing.document(documents.image(image))
        else:
            printing.say(f"{image.name} ({image.id}) is there, {sizes.human(image.size_bytes)}, Linux {image.kernel}")

    connected(work)


@app.command()
def ls(as_json: printing.Json = False) -> None:
    """List the images."""

    async def work(forky: "Forky") -> None:
        found = await forky.images()
        if as_json:
            printing.document([documents.image(image) for image in found])
            return
        if not found:
            printing.say("There is no image yet. Build one: forky image build; `forky run` does it by itself")
            return
        rows = [
            (image.name, image.id, sizes.human(image.size_bytes), image.kernel, printing.ago(image.created_us))
            for image in found
        ]
        printing.table(("NAME", "ID", "SIZE", "KERNEL", "AGE"), rows)

    connected(work)


@app.command(name="set")
def change(
    image: ImageName,
    forget: Annotated[
        str, typer.Option("--forget", metavar="PATH,…|none", help="Files that forks of its machines don't have.")
    ],
    as_json: printing.Json = False,
) -> None:
    """Change an image's settings: the files with secrets, which are wiped in every fork of its machines."""
    paths = [] if forget == "none" else [path.strip() for path in forget.split(",") if path.strip()]

    async def work(forky: "Forky") -> None:
        found = await forky.update_image((await forky.get_image(image)).id, forget_files=paths)
        if as_json:
            printing.document(documents.image(found))
        else:
            printing.say(f"forks of machines of {found.name} forget {', '.join(found.forget_files) or 'no file'}")

    connected(work)


@app.command()
def rm(image: ImageName, as_json: printing.Json = False) -> None:
    """Remove an image that nothing stands on."""

    async def work(forky: "Forky") -> None:
        found = await forky.get_image(image)
        await forky.remove_image(found.id)
        if as_json:
            printing.document({"removed": [{"type": "image", "id": found.id, "name": found.name}]})
        else:
            printing.say(f"removed image {found.name}")

    connected(work)


@app.command()
def inspect(image: ImageName, as_json: printing.Json = False) -> None:
    """Show everything about an image."""

    async def work(forky: "Forky") -> None:
        found = documents.image(await forky.get_image(image))
        if as_json:
            printing.document(found)
        else:
            printing.fields([(key, str(value) or "-") for key, value in found.items()])

    connected(work)

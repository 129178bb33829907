"""HTML pages of reports, filled in from templates."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(name: str, **values: object) -> str:
    """Fills in a template of the folder ``templates``.

    Args:
        name: File name of the template.
        **values: What the template shows; text is escaped.

    Returns:
        The page as HTML.
    """
    environment = Environment(
        loader=PackageLoader("max_diffusion.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(**values)

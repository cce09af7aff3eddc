"""What a run leaves for people to read: `report.html`, pictures, tables, the ablation ladder."""

from cc4s.report.figures import (
    contact_sheet,
    curve_figures,
    curves,
    eigenvector_panel,
    figure_png,
    figure_svg,
    legend,
)
from cc4s.report.html import write_report
from cc4s.report.ladder import (
    Rung,
    ladder_figure,
    ladder_markdown,
    robustness_curves,
    robustness_figure,
    robustness_markdown,
    summarize_ladder,
    write_ladder,
)
from cc4s.report.overlays import (
    ReportImage,
    draw_scribble,
    eigenvalue_caption,
    eigenvector_picture,
    overlay,
)
from cc4s.report.tables import (
    format_number,
    format_percent,
    format_seconds,
    format_spread,
    markdown_table,
    mean_and_std,
    text_table,
)
from cc4s.report.tuning import tuning_markdown, write_tuning

__all__ = [
    "ReportImage",
    "Rung",
    "contact_sheet",
    "curve_figures",
    "curves",
    "draw_scribble",
    "eigenvalue_caption",
    "eigenvector_panel",
    "eigenvector_picture",
    "figure_png",
    "figure_svg",
    "format_number",
    "format_percent",
    "format_seconds",
    "format_spread",
    "ladder_figure",
    "ladder_markdown",
    "legend",
    "markdown_table",
    "mean_and_std",
    "overlay",
    "robustness_curves",
    "robustness_figure",
    "robustness_markdown",
    "summarize_ladder",
    "text_table",
    "tuning_markdown",
    "write_ladder",
    "write_report",
    "write_tuning",
]

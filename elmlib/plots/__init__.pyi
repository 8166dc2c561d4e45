from .curves import LiveCurves as LiveCurves, draw_curves as draw_curves, draw_map as draw_map, to_png as to_png
from .report import (
    draw_report as draw_report,
    plot_ranks as plot_ranks,
    plot_similarity as plot_similarity,
    ranks_info as ranks_info,
    similarity_info as similarity_info,
)
from .study import draw_study as draw_study, draw_variants as draw_variants

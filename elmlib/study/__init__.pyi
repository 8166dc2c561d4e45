from .results import (
    best_trial as best_trial,
    cells_frame as cells_frame,
    default_trial as default_trial,
    open_study as open_study,
    results_frame as results_frame,
    serve_dashboard as serve_dashboard,
    trials_frame as trials_frame,
    variants_frame as variants_frame,
)
from .study import StudyFailedError as StudyFailedError, run_study as run_study, submit_launchers as submit_launchers
from .trial import OptunaCallback as OptunaCallback

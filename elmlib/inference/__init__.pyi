from .batch import generate_file as generate_file, read_pairs as read_pairs
from .explore import (
    Explorer as Explorer,
    add_direction as add_direction,
    interpolate as interpolate,
    mean_vector as mean_vector,
    newest_run as newest_run,
    read_vector as read_vector,
)
from .summarizer import Elm as Elm

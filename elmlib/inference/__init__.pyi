from .batch import TextPairs as TextPairs, generate_file as generate_file, read_pairs as read_pairs
from .explore import (
    Cards as Cards,
    Decoding as Decoding,
    Explorer as Explorer,
    Question as Question,
    add_direction as add_direction,
    interpolate as interpolate,
    mean_vector as mean_vector,
    newest_run as newest_run,
    path_or_numbers as path_or_numbers,
    project as project,
    read_vector as read_vector,
)
from .summarizer import Elm as Elm

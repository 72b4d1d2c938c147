"""The trainer behind `timm-qkformer train` and `validate`: images and events, put together of timm's parts.

- `options`, `settings`: train.py's flags and recipe files, and what they have to agree on
- `datasets`, `loaders`, `replay`, `mixing`, `randomness`: data whose position and random numbers can be saved and
  taken up again
- `network`, `rounding`, `sync_bn`, `distributed`: model and task, on one process or several
- `checkpoint`, `resume`, `schedule`: files that are complete or not there, and how a run goes on from them
- `loop`, `evaluation`: one epoch, one pass over the validation data
- `log`, `curves`: what a run leaves behind to look at
- `run`, `validation`: the two commands

Nothing is imported here, so that the command line can read `options` without loading torch.
"""

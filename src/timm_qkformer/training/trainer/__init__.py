"""The trainer behind `timm-qkformer train` and `validate`: images and events, put together of timm's parts.

- `settings`, `config`: train.py's options as one frozen value; command line and recipe files that fill it
- `data`, `replay`: data sets and loaders, whose position and random numbers can be saved and resumed
- `network`, `quantize`, `distributed`: model and task, on one process or several
- `checkpoint`: files that are complete or not there, found and resumed from
- `loop`, `evaluate`: one epoch; one pass over the validation data, and the command `validate`
- `log`: what a run tells and leaves behind to look at
- `engine`: the run, and the command `train`

Nothing is imported here, so that the command line can read `config` without loading torch.
"""

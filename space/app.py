"""A Hugging Face Space: the page of `timm-qkformer app` with the models that come with the package."""

from timm_qkformer.app.look import Models
from timm_qkformer.app.page import serve

if __name__ == "__main__":
    serve(Models(), host="0.0.0.0", port=7860)  # where a Space looks for it

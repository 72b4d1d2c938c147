"""A page in the browser on which a model looks at a file: `timm-qkformer app`. `page` needs the extra `app`."""

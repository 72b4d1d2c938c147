#!/bin/sh
# In a manylinux container: a wheel with kernels that old systems can load, in dist/. `make manylinux` calls it.
set -eu
export TIMM_QKFORMER_BUILD_KERNELS=1
/opt/python/cp312-cp312/bin/python -m pip wheel --quiet --no-deps --wheel-dir /tmp/wheels .
auditwheel repair --plat "manylinux_2_28_$(uname -m)" --wheel-dir dist /tmp/wheels/*.whl

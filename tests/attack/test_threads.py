"""Eight threads on one deployed model that has not run yet: the answers of one thread, to the last bit."""

import threading

import pytest
import torch

import tiny
from timm_qkformer import deploy

ROUNDS = 10


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_eight_threads_share_a_deployed_model(precision, tally):
    for trial in range(ROUNDS):
        torch.manual_seed(trial)
        model = tiny.tiny(["test_qkformer", "test_maxformer"][trial % 2]).float()
        expected_model, shared = deploy(model, precision), deploy(model, precision)
        inputs = [tiny.images(1 + i % 3, size=(16 + 16 * (i % 2), 16)).float() for i in range(8)]
        expected = [expected_model.forward_features(x) for x in inputs]
        barrier, found = threading.Barrier(8), [None] * 8

        def work(i, shared=shared, inputs=inputs, barrier=barrier, found=found):
            barrier.wait()
            # Some in inference mode: what it makes must not stay with the model.
            with torch.inference_mode(i % 2 == 0):
                found[i] = [shared.forward_features(inputs[i]).clone() for _ in range(5)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, (wanted, answers) in enumerate(zip(expected, found, strict=True)):
            held = answers is not None and all(torch.equal(answer, wanted) for answer in answers)
            tally.attempt(held, f"trial {trial}, thread {i}")

"""VLMEvalKit: `python -m tpcompress.harness.vlmevalkit --pretrained DIR --data MMBench_DEV_EN`, see `launcher`."""

"""Models of tpcompress inside evaluation harnesses: lmms-eval (`lmms_eval`) and VLMEvalKit (`vlmevalkit`)."""

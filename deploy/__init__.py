"""The same pair on a GPU server: manifests for vLLM and SGLang, and what checks them."""

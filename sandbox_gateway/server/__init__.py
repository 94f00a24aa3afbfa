"""The gateway: Jupyter's kernel protocol over HTTP for sandboxed kernels, as an extension of jupyter_server and headless.

Names are imported on first use, so that ``jupyter server extension list`` stays cheap.
"""

"""Order of the folders of the package."""

# A folder may import the ones that stand before it, and itself.
ORDER = (
    "errors", "version", "config", "formats", "kernels", "model", "data", "runtime", "methods", "compression",
    "measure", "exporters", "serve", "rollout", "cli",
    "calibration",  # the import path of version 0.1, for one release; no folder may import it
    "__main__",
)  # fmt: skip

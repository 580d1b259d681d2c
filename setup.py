"""Builds the C extension, where it can be built; all metadata is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "celery_influx._speedups",
            ["celery_influx/_speedups.c", "celery_influx/_shortest.cpp"],
            optional=True,  # what it does Python can do, too: a warning says that it failed
        )
    ]
)

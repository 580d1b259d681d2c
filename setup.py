"""All metadata is in pyproject.toml; this file is where the optional C extension will be built."""

from setuptools import setup

setup()

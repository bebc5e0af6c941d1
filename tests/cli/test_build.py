"""`build engine` and the commands of single stages, on a real run."""

import json
import shutil
from pathlib import Path

import pytest

from adatsq_trt.cli.build import StageName
from adatsq_trt.policy import Policy
from adatsq_trt.report.summary import Summary
from adatsq_trt.settings import Settings
from tests.cli.conftest import BUILD, SMALL, Cli, digest

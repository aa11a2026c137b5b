"""The real server on a real PACS of fifty mixed series serves the good and refuses the bad."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from monailabel.client.client import MONAILabelClientException
from serving import MODEL, copy_app, free_port, serving
from test_mixed_series import BAD, fifty  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from environment import SetupError
from orthanc import check_installed, running_orthanc, store

pytestmark = pytest.mark.slow

REASONS = BAD | {"cut pixels": BAD["missing slices"]}
"""The PACS takes no image that is cut off, so what it has of such a series has a gap."""


def test_good_series_are_served_and_each_bad_one_is_refused_with_its_reason(fifty, tmp_path):  # noqa: F811
    try:
        check_installed()
    except SetupError as error:
        pytest.skip(str(error))
    folder, cases = fifty
    with running_orthanc(tmp_path / "orthanc", free_port()) as pacs:
        refused = store(pacs, (file for file in folder.rglob("*") if file.is_file()))
        cut = {str(case.folder) for case in cases.values() if case.kind == "cut pixels"}
        assert {str(file.parent) for file in refused if file.name != "rubbish.dcm"} == cut
        variables = {"MONAI_LABEL_DICOMWEB_CACHE_PATH": str(tmp_path / "cache")}
        app = copy_app(tmp_path / "app")
        with serving(app, pacs.dicomweb, tmp_path, variables) as running:
            client = running.client
            for uid, case in cases.items():
                if case.kind in BAD:
                    with pytest.raises(MONAILabelClientException) as error:
                        client.infer(MODEL, uid, {})
                    assert "422" in error.value.msg, case.kind
                    message = error.value.msg
                    assert re.search(REASONS[case.kind], message), (case.kind, message)
                else:
                    assert "model" in client.infer(MODEL, uid, {})[1], case.kind

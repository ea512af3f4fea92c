"""The verb `inspect`: what is in a bundle."""

from __future__ import annotations

from scripts.bundles import verified_bundle
from scripts.console import print_json
from scripts.options import AsJson, BundleFolder


def inspect(folder: BundleFolder, as_json: AsJson = False) -> None:
    """Verify a bundle and show what is in it."""
    bundle = verified_bundle(folder)
    if as_json:
        print_json(
            {"bundle": str(folder), "verified": bundle.verified, "manifest": bundle.to_json()}
        )
        return
    from scripts.views.bundle import print_bundle

    print_bundle(bundle)

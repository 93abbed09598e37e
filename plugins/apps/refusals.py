"""Why a phone's package manager refuses an app, in words for a person."""

from typing import Final

from server.i18n import N_

REFUSALS: Final = {
    "INSTALL_FAILED_OLDER_SDK": N_("The app needs a newer Android than this phone has."),
    "INSTALL_FAILED_VERSION_DOWNGRADE": N_("The phone has a newer version of this app."),
    "INSTALL_FAILED_NO_MATCHING_ABIS": N_("The app is built for another kind of processor."),
    "INSTALL_FAILED_MISSING_SPLIT": N_("This file is only a part of an app and cannot be installed alone."),
    "INSTALL_FAILED_INSUFFICIENT_STORAGE": N_("The phone has too little free space."),
    "INSTALL_FAILED_UPDATE_INCOMPATIBLE": N_(
        "The phone has this app with another signature; uninstall it first."
    ),
}

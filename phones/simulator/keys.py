"""Android's key codes, by name. Source: android.view.KeyEvent."""

_NAMES = [
    "UNKNOWN",
    "SOFT_LEFT",
    "SOFT_RIGHT",
    "HOME",
    "BACK",
    "CALL",
    "ENDCALL",
    "0",
    "1",
    "2",
    "3",
    "4",
    "5",
    "6",
    "7",
    "8",
    "9",
    "STAR",
    "POUND",
    "DPAD_UP",
    "DPAD_DOWN",
    "DPAD_LEFT",
    "DPAD_RIGHT",
    "DPAD_CENTER",
    "VOLUME_UP",
    "VOLUME_DOWN",
    "POWER",
    "CAMERA",
    "CLEAR",
    "A",
    "B",
    "C",
    "D",
    "E",
    "F",
    "G",
    "H",
    "I",
    "J",
    "K",
    "L",
    "M",
    "N",
    "O",
    "P",
    "Q",
    "R",
    "S",
    "T",
    "U",
    "V",
    "W",
    "X",
    "Y",
    "Z",
    "COMMA",
    "PERIOD",
    "ALT_LEFT",
    "ALT_RIGHT",
    "SHIFT_LEFT",
    "SHIFT_RIGHT",
    "TAB",
    "SPACE",
    "SYM",
    "EXPLORER",
    "ENVELOPE",
    "ENTER",
    "DEL",
    "GRAVE",
    "MINUS",
    "EQUALS",
    "LEFT_BRACKET",
    "RIGHT_BRACKET",
    "BACKSLASH",
    "SEMICOLON",
    "APOSTROPHE",
    "SLASH",
    "AT",
    "NUM",
    "HEADSETHOOK",
    "FOCUS",
    "PLUS",
    "MENU",
    "NOTIFICATION",
    "SEARCH",
    "MEDIA_PLAY_PAUSE",
    "MEDIA_STOP",
    "MEDIA_NEXT",
    "MEDIA_PREVIOUS",
    "MEDIA_REWIND",
    "MEDIA_FAST_FORWARD",
    "MUTE",
    "PAGE_UP",
    "PAGE_DOWN",
]

CODES: dict[str, int] = {name: code for code, name in enumerate(_NAMES)} | {
    "ESCAPE": 111,
    "FORWARD_DEL": 112,
    "CTRL_LEFT": 113,
    "CTRL_RIGHT": 114,
    "CAPS_LOCK": 115,
    "MOVE_HOME": 122,
    "MOVE_END": 123,
    "NUMPAD_ENTER": 160,
    "VOLUME_MUTE": 164,
    "SETTINGS": 176,
    "APP_SWITCH": 187,
    "ASSIST": 219,
    "BRIGHTNESS_DOWN": 220,
    "BRIGHTNESS_UP": 221,
    "SLEEP": 223,
    "WAKEUP": 224,
    "CUT": 277,
    "COPY": 278,
    "PASTE": 279,
}

LAST_CODE = 316

HOME, BACK, POWER, MENU = CODES["HOME"], CODES["BACK"], CODES["POWER"], CODES["MENU"]
DEL, APP_SWITCH = CODES["DEL"], CODES["APP_SWITCH"]
SLEEP, WAKEUP, ESCAPE = CODES["SLEEP"], CODES["WAKEUP"], CODES["ESCAPE"]

TYPED: dict[int, str] = (
    {CODES[letter]: letter.lower() for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    | {CODES[digit]: digit for digit in "0123456789"}
    | {
        CODES[name]: character
        for name, character in {
            "APOSTROPHE": "'",
            "AT": "@",
            "BACKSLASH": "\\",
            "COMMA": ",",
            "ENTER": "\n",
            "EQUALS": "=",
            "GRAVE": "`",
            "LEFT_BRACKET": "[",
            "MINUS": "-",
            "NUMPAD_ENTER": "\n",
            "PERIOD": ".",
            "PLUS": "+",
            "POUND": "#",
            "RIGHT_BRACKET": "]",
            "SEMICOLON": ";",
            "SLASH": "/",
            "SPACE": " ",
            "STAR": "*",
            "TAB": " ",
        }.items()
    }
)
"""What a key puts into a text field."""


def key_code(text: str) -> int | None:
    """The code for `KEYCODE_HOME`, `HOME` or `3`; None for what is no key."""
    if text.isascii() and text.isdigit():
        code = int(text[:9])
        return code if code <= LAST_CODE else None
    return CODES.get(text.upper().removeprefix("KEYCODE_"))

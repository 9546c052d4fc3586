"""``python -m fedhpc.report [RUN_DIR]``."""

from fedhpc.report import app

if __name__ == "__main__":
    app()

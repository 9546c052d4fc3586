"""``python -m fedhpc.doctor CONFIG``."""

from fedhpc.doctor import app

if __name__ == "__main__":
    app()

"""Makes the certificates of one run; `fedhpc.federation.certificates` uses them."""

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedhpc.errors import PlatformError
from fedhpc.files import write_atomic

_LIFETIME_DAYS = 365


def create(folder: Path) -> None:
    """Make a CA and one certificate each for the server and the array tasks.

    The folder is 0700 and the files 0600. They are valid from a day back, because the clocks of
    two nodes may differ.

    Raises
    ------
    PlatformError
        If the folder cannot be written.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise PlatformError(f"could not create {folder}: {error.strerror}") from error
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = _name("fedhpc-ca")
    ca = (
        _builder(ca_name, ca_name, ca_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    for role, usage in (
        ("server", ExtendedKeyUsageOID.SERVER_AUTH),
        ("client", ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        name = f"fedhpc-{role}"
        certificate = (
            _builder(_name(name), ca_name, key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_atomic(folder / f"{role}.key", private, mode=0o600)
        public = certificate.public_bytes(serialization.Encoding.PEM)
        write_atomic(folder / f"{role}.crt", public, mode=0o600)
    # Last, so that a folder with it is complete. The CA's key is forgotten here.
    write_atomic(folder / "ca.crt", ca.public_bytes(serialization.Encoding.PEM), mode=0o600)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=_LIFETIME_DAYS))
    )

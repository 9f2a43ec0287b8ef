#!/bin/sh
# Makes a practice PKI in this folder, with openssl (3.0 or newer): an authority, and certificates that it issued, good
# ones and bad ones. The keys are public, in both senses: they are checked in. Never use them for anything but practice.
set -eu
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# What `openssl ca` needs to know, and what each kind of certificate says.
cat > "$work/ca.conf" <<END
[ca]
default_ca = practice
[practice]
new_certs_dir = $work
database = $work/index
rand_serial = yes
default_md = sha256
policy = any
unique_subject = no
[any]
commonName = supplied
organizationName = optional
[req]
distinguished_name = asked
[asked]
[authority]
basicConstraints = critical, CA:true
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:false
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = DNS:localhost, IP:127.0.0.1, IP:::1
[other]
basicConstraints = critical, CA:false
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = DNS:elsewhere.example
END
: > "$work/index"

key() { openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1.key" 2>/dev/null ||
  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1.key" 2>/dev/null; }
subject() { echo "/O=chat practice PKI, not to be trusted/CN=$1"; }

# issue NAME EXTENSIONS FROM UNTIL: a certificate of the authority's for a new key.
issue() {
  key "$1"
  openssl req -new -key "$1.key" -subj "$(subject "$1")" -config "$work/ca.conf" -out "$work/$1.csr"
  openssl ca -batch -notext -config "$work/ca.conf" -extensions "$2" -startdate "$3" -enddate "$4" \
    -cert ca.pem -keyfile ca.key -in "$work/$1.csr" -out "$1.pem" 2>/dev/null
}

key ca
openssl req -new -x509 -key ca.key -subj "$(subject ca)" -config "$work/ca.conf" -extensions authority -days 36500 -out ca.pem
issue server server 20260101000000Z 21250101000000Z
issue expired server 20250101000000Z 20250201000000Z
issue early server 21240101000000Z 21250101000000Z
issue other other 20260101000000Z 21250101000000Z
key selfsigned
openssl req -new -x509 -key selfsigned.key -subj "$(subject selfsigned)" -config "$work/ca.conf" -extensions server \
  -days 36500 -out selfsigned.pem
for name in server expired early other; do openssl verify -no_check_time -CAfile ca.pem "$name.pem"; done

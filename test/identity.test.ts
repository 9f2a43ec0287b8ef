import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import crypto from "node:crypto";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { test } from "node:test";
import { Fault, makeIdentity, pinOf, readPem, readPin, selfSigned } from "../chat.ts";
import { type Runtime, serveProcess, wants } from "./helpers.ts";

const newKey = () => crypto.generateKeyPairSync("ec", { namedCurve: "P-256" }).privateKey;
const pem = (key: crypto.KeyObject) => key.export({ type: "pkcs8", format: "pem" }).toString();

/** The Fault that `run` throws. */
function fault(run: () => unknown): Fault {
  try {
    run();
  } catch (error) {
    assert.ok(error instanceof Fault, String(error));
    return error;
  }
  assert.fail("nothing was thrown");
}

test("a pin is the first 120 bits of SHA-256 over the SubjectPublicKeyInfo, in base32", () => {
  const key = crypto.createPublicKey(newKey());
  const der = key.export({ type: "spki", format: "der" });
  const hash = crypto.createHash("sha256").update(der).digest();
  let bits = "";
  for (const byte of hash.subarray(0, 15)) bits += byte.toString(2).padStart(8, "0");
  const digits = bits.match(/.{5}/g)?.map((five) => "abcdefghijklmnopqrstuvwxyz234567"[parseInt(five, 2)]).join("");
  assert.equal(pinOf(key), digits?.match(/.{4}/g)?.join("-"));
  assert.match(pinOf(key), /^([a-z2-7]{4}-){5}[a-z2-7]{4}$/);
});

test("a pin is read in any case, with or without hyphens, and other texts are not", () => {
  const pin = "k3mf-x2qd-7xpa-44rt-5zpq-m2nc";
  for (const text of [pin, pin.toUpperCase(), pin.replaceAll("-", ""), "K3MFX2QD-7xpa44rt5zpqm2nc"]) {
    assert.equal(readPin(text), pin);
  }
  for (const text of ["", pin.slice(1), `${pin}a`, pin.replace("k", "1"), pin.replace("k", "é")]) {
    assert.equal(readPin(text), undefined);
  }
});

test("a self-signed certificate names this machine, is valid for ten years, and its signature verifies", () => {
  const key = newKey();
  const cert = new crypto.X509Certificate(selfSigned(key));
  assert.equal(cert.subject, "CN=chat");
  assert.ok(cert.verify(crypto.createPublicKey(key)));
  assert.ok(cert.checkIssued(cert));
  assert.equal(cert.checkHost("localhost"), "localhost");
  assert.equal(cert.checkIP("127.0.0.1"), "127.0.0.1");
  assert.equal(cert.checkIP("::1"), "::1");
  const years = (Date.parse(cert.validTo) - Date.now()) / 31_557_600_000;
  assert.ok(years > 9.9 && years < 10.1 && Date.parse(cert.validFrom) < Date.now());
  assert.notEqual(cert.serialNumber, new crypto.X509Certificate(selfSigned(key)).serialNumber);
});

test("OpenSSL and GnuTLS accept a self-signed certificate", wants("openssl", "certtool"), () => {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "chat-cert-"));
  const file = path.join(folder, "cert.pem");
  fs.writeFileSync(file, selfSigned(newKey()));
  const openssl = (...args: string[]) => execFileSync("openssl", args, { encoding: "utf8" });
  assert.match(openssl("verify", "-x509_strict", "-check_ss_sig", "-CAfile", file, file), /: OK/);
  assert.match(openssl("x509", "-in", file, "-noout", "-text"), /Version: 3[\s\S]*ecdsa-with-SHA256/);
  openssl("asn1parse", "-in", file, "-strictpem");
  const output = execFileSync("certtool", ["--verify", "--load-ca-certificate", file, "--infile", file], {
    encoding: "utf8",
  });
  assert.match(output, /Chain verification output: Verified/);
  fs.rmSync(folder, { recursive: true });
});

const SECRET = "0123456789abcdefghijklmn";

test("a secret always derives the same key, and another secret derives another key", () => {
  const { pin } = makeIdentity({ secret: SECRET });
  assert.equal(makeIdentity({ secret: SECRET }).pin, pin);
  assert.notEqual(makeIdentity({ secret: `${SECRET}x` }).pin, pin);
  assert.notEqual(makeIdentity({}).pin, makeIdentity({}).pin);
});

for (const runtime of ["binary", "node", "deno", "node20"] as readonly Runtime[]) {
  test(`CHAT_SECRET derives the same key with ${runtime}`, async (t) => {
    const server = await serveProcess(t, [], { runtime, env: { CHAT_SECRET: SECRET } });
    assert.equal(server.pin, makeIdentity({ secret: SECRET }).pin);
  });
}

test("a secret with fewer than 24 characters is refused", () => {
  assert.match(fault(() => makeIdentity({ secret: SECRET.slice(1) })).message, /CHAT_SECRET is too short/);
});

test("each mistake in CHAT_KEY and CHAT_CERT is refused with a message of its own", () => {
  const key = newKey();
  const [own, other] = [selfSigned(key), selfSigned(newKey())];
  const wrong = (from: { key?: string; cert?: string }) => fault(() => makeIdentity(from));
  assert.equal(makeIdentity({ key: pem(key), cert: own }).pin, pinOf(crypto.createPublicKey(key)));
  assert.match(wrong({ key: pem(key) }).message, /CHAT_CERT is not set/);
  assert.match(wrong({ cert: own }).message, /CHAT_KEY is not set/);
  assert.match(wrong({ key: pem(key), cert: other }).message, /do not fit/);
  assert.match(wrong({ key: "/etc/ssl/key.pem", cert: own }).message, /not its path/);
  assert.equal(wrong({ key: "/etc/ssl/key.pem", cert: own }).hint, 'export CHAT_KEY="$(cat /etc/ssl/key.pem)"');
  assert.match(wrong({ key: own, cert: own }).message, /CHAT_KEY is not that of a private key/);
  assert.match(wrong({ key: pem(key), cert: pem(key) }).message, /CHAT_CERT is not that of a certificate/);
  const locked = key.export({ type: "pkcs8", format: "pem", cipher: "aes-256-cbc", passphrase: "x" }).toString();
  assert.match(wrong({ key: locked, cert: own }).message, /encrypted/);
});

test("the message about an unreadable key does not print what was in the variable", () => {
  const { message, hint } = fault(() => readPem("CHAT_KEY", "s3cr3t that is no path!", "private key", String));
  assert.match(message, /CHAT_KEY must hold the PEM text of a private key/);
  assert.doesNotMatch(message + hint, /s3cr3t/);
});

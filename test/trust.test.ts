// Who the server is, who is in the middle, and what can be watched.
import assert from "node:assert/strict";
import { execFileSync, spawnSync } from "node:child_process";
import crypto from "node:crypto";
import { once } from "node:events";
import fs from "node:fs";
import net from "node:net";
import os from "node:os";
import path from "node:path";
import { test, type TestContext } from "node:test";
import tls from "node:tls";
import { type Identity, LIMITS, makeIdentity, parse, pinOf, selfSigned } from "../chat.ts";
import {
  BINARY,
  enter,
  environment,
  joinProcess,
  ROOT,
  Running,
  type Runtime,
  RUNTIMES,
  serveHere,
  serveProcess,
  Terminal,
  Text,
  wants,
} from "./helpers.ts";

const certs = (name: string) => fs.readFileSync(path.join(ROOT, "certs", name), "utf8");
const CA = certs("ca.pem");

/** An identity of the practice PKI, also one that `makeIdentity` would refuse. */
function practice(name: string): Identity {
  const cert = certs(`${name}.pem`);
  const leaf = new crypto.X509Certificate(cert);
  const binding = crypto.createHash("sha256").update(leaf.raw).digest();
  return { key: certs(`${name}.key`), cert, pin: pinOf(leaf.publicKey), binding };
}

interface Case {
  readonly certificate: string;
  readonly host: string;
  readonly ca: boolean;
  readonly status: number;
  readonly says: RegExp;
}

/** 0.0.0.0 reaches this machine too, but is not written as loopback: it is judged as an address far away. */
const TRUST: readonly Case[] = [
  { certificate: "server", host: "localhost", ca: true, status: 0, says: /^chat: in #chat/ },
  { certificate: "server", host: "127.0.0.1", ca: true, status: 0, says: /^chat: in #chat/ },
  {
    certificate: "server",
    host: "localhost",
    ca: false,
    status: 0,
    says: /^chat: localhost is this machine: took its key \S+ unchecked\n/,
  },
  {
    certificate: "server",
    host: "0.0.0.0",
    ca: true,
    status: 3,
    says: /its certificate is for localhost, 127\.0\.0\.1/,
  },
  {
    certificate: "server",
    host: "0.0.0.0",
    ca: false,
    status: 3,
    says: /its certificate leads to no root that is trusted here/,
  },
  { certificate: "selfsigned", host: "0.0.0.0", ca: true, status: 3, says: /leads to no root/ },
  {
    certificate: "selfsigned",
    host: "localhost",
    ca: true,
    status: 0,
    says: /unchecked\nchat: its certificate leads to no root/,
  },
  { certificate: "expired", host: "0.0.0.0", ca: true, status: 3, says: /expired on 2025-02-01/ },
  {
    certificate: "expired",
    host: "localhost",
    ca: true,
    status: 0,
    says: /unchecked\nchat: its certificate expired on 2025-02-01/,
  },
  { certificate: "early", host: "0.0.0.0", ca: true, status: 3, says: /is not valid before 2124-01-01/ },
  {
    certificate: "other",
    host: "localhost",
    ca: true,
    status: 0,
    says: /unchecked\nchat: its certificate is for elsewhere\.example/,
  },
  { certificate: "other", host: "0.0.0.0", ca: true, status: 3, says: /is for elsewhere\.example/ },
];

for (const runtime of Object.keys(RUNTIMES) as Runtime[]) {
  test(`every certificate of the practice PKI gets what the order of trust says, on ${runtime}`, async (t) => {
    for (const { certificate, host, ca, status, says } of TRUST) {
      const identity = practice(certificate);
      const { port } = await serveHere(t, { identity, host: "0.0.0.0" } as object);
      const env: Record<string, string> = ca ? { CHAT_CA: CA } : {};
      const plainly = joinProcess(t, `ana@${host}:${port}`, [], { runtime, env });
      plainly.end("hello\n");
      assert.equal(await plainly.ended, status, `${certificate} as ${host}: ${plainly.err.all}`);
      assert.match(plainly.err.all, says, `${certificate} as ${host}`);
      if (status === 0) continue;
      assert.match(
        plainly.err.all,
        new RegExp(`^chat: nobody vouches for this server: .*\nchat: hint: .* join ${host}:${port}/PIN`),
      );
      const pinned = joinProcess(t, `ana@${host}:${port}/${identity.pin}`, [], { runtime, env });
      pinned.end("hello\n");
      assert.equal(await pinned.ended, 0, `a pin counts, and nothing else: ${pinned.err.all}`);
    }
  });

  test(`a wrong pin ends with 3 before a byte is sent, even if a root vouches for the server, on ${runtime}`, async (t) => {
    const heard = new Text();
    const server = tls.createServer({ key: certs("server.key"), cert: certs("server.pem") }, (socket) => {
      socket.on("error", () => {});
      socket.on("data", (chunk) => heard.add(chunk));
    });
    server.on("tlsClientError", () => {});
    server.listen(0, "127.0.0.1");
    await once(server, "listening");
    t.after(() => server.close());
    const { port } = server.address() as net.AddressInfo;
    const wrong = joinProcess(t, `ana@localhost:${port}/${makeIdentity({}).pin}`, [], {
      runtime,
      env: { CHAT_CA: CA },
    });
    wrong.end("hello\n");
    assert.equal(await wrong.ended, 3);
    assert.match(
      wrong.err.all,
      /^chat: this server has the key \S+, not \S+\nchat: hint: somebody may sit in the middle/,
    );
    assert.equal(heard.all, "");
  });
}

test("serve takes the operator's own certificate, and join finds it vouched for", async (t) => {
  const server = await serveProcess(t, [], {
    env: { CHAT_KEY: certs("server.key"), CHAT_CERT: certs("server.pem") + CA },
  });
  assert.equal(server.pin, practice("server").pin);
  const joining = joinProcess(t, `ana@localhost:${server.port}`, ["--explain"], { env: { CHAT_CA: CA } });
  joining.end("hi\n");
  assert.equal(await joining.ended, 0);
  assert.match(joining.err.all, /trusted, because its certificate leads to a trusted root and is for this name/);
  assert.doesNotMatch(joining.err.all, /unchecked/);
});

test("bad keys and certificates are refused at the start, in words that help", () => {
  const serve = (env: Record<string, string>) => {
    const { status, stderr } = spawnSync(BINARY, ["serve", ":0"], { env: environment(env), encoding: "utf8" });
    assert.equal(status, 1);
    return stderr;
  };
  assert.match(
    serve({ CHAT_KEY: certs("expired.key"), CHAT_CERT: certs("expired.pem") }),
    /CHAT_CERT expired on 2025-02-01\nchat: hint: /,
  );
  assert.match(
    serve({ CHAT_KEY: certs("early.key"), CHAT_CERT: certs("early.pem") }),
    /is not valid before 2124-01-01/,
  );
  assert.match(serve({ CHAT_KEY: certs("other.key"), CHAT_CERT: certs("server.pem") }), /do not fit/);
  assert.match(
    serve({ CHAT_KEY: "certs/server.key", CHAT_CERT: certs("server.pem") }),
    /not its path\nchat: hint: export CHAT_KEY="\$\(cat certs\/server\.key\)"/,
  );
  const join = (ca: string) => {
    const { status, stderr } = spawnSync(BINARY, ["join", "ana@localhost:1"], {
      env: environment({ CHAT_CA: ca }),
      encoding: "utf8",
    });
    assert.equal(status, 1);
    return stderr;
  };
  assert.match(join(certs("server.pem")), /CHAT_CA is none of an authority/);
  assert.match(
    join("ca.pem"),
    /CHAT_CA must hold the PEM text of a certificate, not its path\nchat: hint: export CHAT_CA=/,
  );
});

// ---- Somebody in the middle

/** A TLS proxy with a key of its own, which relays every byte and keeps what it saw. */
async function middle(
  t: TestContext,
  port: number,
  change = (chunk: Buffer) => chunk,
): Promise<{ port: number; seen: Text; pin: string }> {
  const key = crypto.generateKeyPairSync("ec", { namedCurve: "P-256" }).privateKey;
  const cert = selfSigned(key);
  const seen = new Text();
  const proxy = tls.createServer(
    { key: key.export({ type: "pkcs8", format: "pem" }), cert, ALPNProtocols: ["irc"] },
    (victim) => {
      const server = tls.connect({ host: "127.0.0.1", port, rejectUnauthorized: false, ALPNProtocols: ["irc"] });
      for (const [from, to, edit] of [[victim, server, (chunk: Buffer) => chunk], [server, victim, change]] as const) {
        from.on("data", (chunk: Buffer) => {
          seen.add(chunk);
          to.write(edit(chunk));
        });
        from.on("error", () => to.destroy());
        from.on("close", () => to.end());
      }
    },
  );
  proxy.listen(0, "127.0.0.1");
  await once(proxy, "listening");
  t.after(() => proxy.close());
  return {
    port: (proxy.address() as net.AddressInfo).port,
    seen,
    pin: pinOf(new crypto.X509Certificate(cert).publicKey),
  };
}

/** Whether a password, or anything that would do for it, is in what was seen; messages of SASL are looked into. */
function gaveAway(seen: string, password: string): boolean {
  const inside = seen.split("\r\n").filter((line) => line.startsWith("AUTHENTICATE ")).map((line) =>
    Buffer.from(line.slice(13), "base64").toString("latin1")
  );
  return [seen, ...inside].some((text) => text.includes(password));
}

test(
  "one in the middle gets neither a login nor the password, even if its key was carelessly accepted",
  wants("tmux"),
  async (t) => {
    const { port, server } = await serveHere(t);
    const clean = joinProcess(t, `ana@127.0.0.1:${port}`, [], { password: "s3cr3t" });
    clean.end("registered over a clean connection\n");
    assert.equal(await clean.ended, 0);
    const proxy = await middle(t, port);

    const script = joinProcess(t, `ana@127.0.0.1:${proxy.port}`, [], { password: "s3cr3t" }); // loopback: accepted unchecked
    script.end("x\n");
    assert.equal(await script.ended, 3);
    assert.match(script.err.all, /somebody sits between you and the server\nchat: hint: /);

    const careless = new Terminal(t, [BINARY, "join", `ana@0.0.0.0:${proxy.port}`], { columns: 200 });
    await careless.wait(/screen\?$/);
    careless.enter(proxy.pin.slice(-9));
    await careless.wait(/Password:$/);
    careless.enter("s3cr3t");
    await careless.wait(/somebody sits between you and the server[^]*\[exit 3\]/);

    assert.match(proxy.seen.all, /AUTHENTICATE SCRAM-SCRYPT-PLUS/);
    assert.ok(!gaveAway(proxy.seen.all, "s3cr3t"));
    assert.equal(server.accounts.find("ana")?.sessions.size, 0);

    // What it has seen of a login does not log it in: neither as it was, nor bound to its own connection.
    const messages = proxy.seen.all.split("\r\n").filter((line) =>
      line.startsWith("AUTHENTICATE ") && line.length > 60
    );
    const thief = tls.connect({ host: "127.0.0.1", port, rejectUnauthorized: false });
    const answers = new Text();
    thief.on("data", (chunk) => answers.add(chunk));
    thief.write(
      `CAP REQ sasl\r\nNICK ana\r\nUSER a 0 * :a\r\nAUTHENTICATE SCRAM-SCRYPT-PLUS\r\n${messages[0]}\r\n${
        messages.at(-1)
      }\r\n`,
    );
    await answers.wait(/ 904 /);
    thief.destroy();
  },
);

test("one in the middle who hides SCRAM is told no password, unless a person says so", async (t) => {
  const { port } = await serveHere(t);
  const clean = joinProcess(t, `ana@127.0.0.1:${port}`, [], { password: "s3cr3t" });
  clean.end();
  assert.equal(await clean.ended, 0);
  const strip = (chunk: Buffer) => Buffer.from(chunk.toString("latin1").replace("SCRAM-SCRYPT-PLUS,", ""), "latin1");
  const proxy = await middle(t, port, strip);
  const script = joinProcess(t, `ana@127.0.0.1:${proxy.port}`, [], { password: "s3cr3t" });
  script.end("x\n");
  assert.equal(await script.ended, 3);
  assert.match(script.err.all, /a password is told only to a server that somebody vouches for/);
  assert.ok(!gaveAway(proxy.seen.all, "s3cr3t"));
});

test("a server that knew SCRAM and then does not is not told the password either, though its key is the same", async (t) => {
  const identity = makeIdentity({});
  const { port, stop } = await serveHere(t, { identity } as object);
  const script = joinProcess(t, `ana@127.0.0.1:${port}/${identity.pin}`, [], { password: "s3cr3t" });
  await script.err.wait(/in #chat/);
  const heard = new Text();
  const impostor = tls.createServer({ key: identity.key, cert: identity.cert, ALPNProtocols: ["irc"] }, (socket) => {
    socket.on("error", () => {});
    socket.on("data", (chunk) => {
      heard.add(chunk);
      socket.write(":s CAP * LS :sasl=PLAIN\r\n:s CAP * ACK :sasl\r\nAUTHENTICATE +\r\n");
    });
  });
  await stop("restarting");
  impostor.listen(port, "127.0.0.1");
  t.after(() => impostor.close());
  assert.equal(await script.ended, 3);
  assert.match(script.err.all, /could check passwords untold, and now wants to be told/);
  assert.ok(!gaveAway(heard.all, "s3cr3t"));
});

test("an impostor that does not know the password is found out", async (t) => {
  const identity = makeIdentity({});
  const heard = new Text();
  const impostor = tls.createServer({ key: identity.key, cert: identity.cert, ALPNProtocols: ["irc"] }, (socket) => {
    let step = 0;
    socket.on("error", () => {});
    socket.on("data", (chunk) => {
      heard.add(chunk);
      for (const text of chunk.toString().split("\r\n").filter(Boolean)) {
        const { command, params } = parse(text);
        if (command === "CAP" && params[0] === "LS") socket.write(":s CAP * LS :sasl=SCRAM-SCRYPT-PLUS,PLAIN\r\n");
        if (command === "CAP" && params[0] === "REQ") socket.write(`:s CAP * ACK :${params[1]}\r\n`);
        if (command !== "AUTHENTICATE") continue;
        const nonce = /r=(.*)$/.exec(Buffer.from(params[0] ?? "", "base64").toString())?.[1];
        const said = [
          "",
          `r=${nonce}x,s=${Buffer.alloc(16).toString("base64")},i=32768`,
          `v=${Buffer.alloc(32).toString("base64")}`,
        ][step++] ?? "";
        socket.write(`AUTHENTICATE ${said ? Buffer.from(said).toString("base64") : "+"}\r\n`);
      }
    });
  });
  impostor.listen(0, "127.0.0.1");
  await once(impostor, "listening");
  t.after(() => impostor.close());
  const { port } = impostor.address() as net.AddressInfo;
  const script = joinProcess(t, `ana@127.0.0.1:${port}`, [], { password: "s3cr3t" });
  script.end("x\n");
  assert.equal(await script.ended, 3);
  assert.match(script.err.all, /this server does not know the password\nchat: hint: it may stand in for the right one/);
  assert.ok(!gaveAway(heard.all, "s3cr3t"));
});

test("one who is in the middle at registration can keep the account, but does not learn the password", async (t) => {
  const { port, server } = await serveHere(t);
  // It answers in the server's place, with a server of its own, and takes the nick at the real one for itself.
  const stolen = await serveHere(t, { identity: makeIdentity({}) } as object);
  const victim = joinProcess(t, `ana@127.0.0.1:${stolen.port}`, [], { password: "s3cr3t" });
  victim.end("I think that I am in the room\n");
  assert.equal(await victim.ended, 0, "the victim notices nothing");
  await enter(t, port, "ana", "", "the thief's own");
  assert.ok(server.accounts.find("ana"), "the thief has the nick");
  const verifier = stolen.server.accounts.find("ana")?.verifier;
  assert.ok(verifier, "and a verifier, which tells no password");
  const later = joinProcess(t, `ana@127.0.0.1:${port}`, [], { password: "s3cr3t" });
  later.end("x\n");
  assert.equal(await later.ended, 1);
  assert.match(later.err.all, /ana is registered here, and not with this password/);
});

// ---- What can be watched

test("--explain tells what happens, true to the connection, on both sides", async (t) => {
  for (const runtime of Object.keys(RUNTIMES) as Runtime[]) {
    const server = await serveProcess(t, ["--explain"], { runtime });
    const joining = joinProcess(t, `ana@127.0.0.1:${server.port}`, ["--explain"], { runtime, password: "hunter7" });
    joining.end("needle\n");
    assert.equal(await joining.ended, 0);
    const told = joining.err.all;
    for (
      const fact of [
        new RegExp(`TCP from 127\\.0\\.0\\.1:\\d+ to 127\\.0\\.0\\.1:${server.port}\n`),
        /TLSv1\.3, TLS_\w+: /,
        /ALPN: both sides want to speak irc\n/,
        /certificate of CN=chat, issued by itself, from .* to .*\n/,
        new RegExp(`its key: ec \\S+, pin ${server.pin}\n`),
        /SHA-256 of its SubjectPublicKeyInfo: [A-Za-z0-9+/]{43}=\n/,
        /trusted, because it is on this machine\n/,
        /registered: the server keeps a verifier, and was not told the password\n/,
        /we prove the password/,
        /wrote (\d+) bytes, in TLS records \d+ \(computed\)/,
        /read \d+ bytes, in TLS records \d+ \(computed\)/,
      ]
    ) assert.match(told, fact, runtime);
    for (const [, clear, records] of told.matchAll(/(\d+) bytes, in TLS records (\d+)/g)) {
      assert.equal(Number(records), Number(clear) + 22 * Math.max(1, Math.ceil(Number(clear) / 16384)));
    }
    if (runtime === "node" || runtime === "binary") {
      assert.match(told, /keys agreed by X25519MLKEM768: a quantum computer does not break it\n/);
    }
    await server.err.wait(/ana and we proved to each other/);
    assert.match(server.err.all, /127\.0\.0\.1:\d+ (wrote|read) \d+ bytes/);
    assert.doesNotMatch(told + server.err.all, /hunter7|needle/);
  }
});

test("the SHA-256 in --explain is the one that GnuTLS prints", wants("gnutls-cli"), async (t) => {
  const server = await serveProcess(t);
  const joining = joinProcess(t, `ana@127.0.0.1:${server.port}`, ["--explain"]);
  joining.end();
  await joining.ended;
  const tool = new Running(t, [
    "gnutls-cli",
    "--insecure",
    "--no-ca-verification",
    "-p",
    String(server.port),
    "127.0.0.1",
  ]);
  const [, hash] = await tool.out.wait(/pin-sha256:(\S+)/);
  assert.ok(joining.err.all.includes(`SubjectPublicKeyInfo: ${hash}`));
});

const root = { ...wants("tshark"), ...process.getuid?.() === 0 ? {} : { skip: "capturing needs root" } };
test("with --keylog a capture can be read, and without the keys it cannot", root, async (t) => {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "chat-capture-"));
  t.after(() => fs.rmSync(folder, { recursive: true }));
  const [capture, keys] = [path.join(folder, "capture.pcapng"), path.join(folder, "keys.txt")];
  const server = await serveProcess(t, ["--keylog"]);
  assert.match(server.err.all, /warning: the TLS keys go to standard output/);
  const shark = new Running(t, ["tshark", "-i", "lo", "-f", `tcp port ${server.port}`, "-w", capture, "-l"]);
  await shark.err.wait(/Capturing on/);
  await shark.err.wait(/File: |Capture started|\n/);
  const bo = await enter(t, server.port, "bo");
  await bo.wait(/NOTICE bo :This server prints its TLS keys/);
  const script = joinProcess(t, `ana@127.0.0.1:${server.port}`, ["--keylog"]);
  script.end("the words that are looked for\n");
  assert.equal(await script.ended, 0);
  assert.match(script.err.all, /^CLIENT_TRAFFIC_SECRET_0 [0-9a-f]{64} /m);
  await bo.wait(/words that are looked for/);
  await server.out.wait(/CLIENT_TRAFFIC_SECRET_0[^]*CLIENT_TRAFFIC_SECRET_0/);
  fs.writeFileSync(keys, server.out.all);
  const inClear = (file: string) =>
    execFileSync(
      "tshark",
      ["-r", capture, "-d", `tcp.port==${server.port},tls`, "-o", `tls.keylog_file:${file}`, "-x"],
      { encoding: "utf8", stdio: "pipe" },
    );
  const find = (text: string) =>
    text.includes("Decrypted TLS") && /w o r d s|words tha|the word/.test(text.replaceAll("\n", " "));
  for (let tries = 0; !find(inClear(keys)) && tries < 100; tries++) {
    await new Promise((later) => setTimeout(later, 100)); // for the capture to be on disk
  }
  assert.ok(find(inClear(keys)));
  fs.writeFileSync(keys, "");
  assert.ok(!/words tha|Decrypted TLS/.test(inClear(keys)));
  shark.child.kill("SIGINT");
  await shark.ended;
});

test("--keylog is a usage error on Deno, which has no such event", () => {
  for (const args of [["serve", ":0", "--keylog"], ["join", "ana@127.0.0.1:1", "--keylog"]]) {
    const [file = "", ...first] = RUNTIMES.deno();
    const { status, stderr } = spawnSync(file, [...first, ...args], { env: environment(), encoding: "utf8" });
    assert.equal(status, 2);
    assert.match(stderr, /--keylog is not possible on Deno\nchat: hint: /);
  }
});

test("who thinks longer than the server waits is connected anew without a word", wants("tmux"), async (t) => {
  const { port, server } = await serveHere(t);
  const ana = new Terminal(t, [BINARY, "join", `127.0.0.1:${port}`]);
  await ana.wait(/Nick:$/);
  ana.enter("ana");
  await ana.wait(/Password:$/);
  const [session] = server.sessions;
  assert.ok(session);
  session.quietSince -= LIMITS.silenceMs + 1;
  server.sweep();
  assert.equal(server.sessions.size, 0);
  ana.enter("secret");
  await ana.wait(/registers it:$/);
  ana.enter("secret");
  await ana.wait(
    /unchecked\nNick: ana\nPassword:\nNo account ana here yet\. The same password again registers it:\nWelcome/,
  );
});

// Whether a server is the right one, what an attacker between client and server learns, and what can be observed.
// ORDERS and FUZZ_SEED let the test of a hostile server's orders try more of them, or the same ones again.
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
import {
  checkCodeOf,
  type Clean,
  Fault,
  type Identity,
  join,
  LIMITS,
  makeIdentity,
  parse,
  pinOf,
  readVerifier,
  scramServer,
  selfSigned,
  type Ui,
  type UiEvents,
  type Verifier,
} from "../chat.ts";
import {
  BINARY,
  enter,
  environment,
  FakeClock,
  freePort,
  joinProcess,
  quickScrypt,
  random,
  ROOT,
  Running,
  type Runtime,
  RUNTIMES,
  serveHere,
  serveProcess,
  Terminal,
  Text,
  until,
  wants,
} from "./helpers.ts";

const certs = (name: string) => fs.readFileSync(path.join(ROOT, "certs", name), "utf8");
const CA = certs("ca.pem");

/** An identity of the practice PKI, including those that `makeIdentity` refuses. */
function practice(name: string): Identity {
  const cert = certs(`${name}.pem`);
  const leaf = new crypto.X509Certificate(cert);
  const binding = crypto.createHash("sha256").update(leaf.raw).digest();
  return { key: certs(`${name}.key`), cert, publicKey: leaf.publicKey, pin: pinOf(leaf.publicKey), binding };
}

interface Case {
  readonly certificate: string;
  readonly host: string;
  readonly ca: boolean;
  readonly status: number;
  readonly says: RegExp;
}

/** 0.0.0.0 reaches this machine too, but is not written as a loopback address: trust is decided as for a remote one. */
const TRUST: readonly Case[] = [
  { certificate: "server", host: "localhost", ca: true, status: 0, says: /^chat: in #chat/ },
  { certificate: "server", host: "127.0.0.1", ca: true, status: 0, says: /^chat: in #chat/ },
  {
    certificate: "server",
    host: "localhost",
    ca: false,
    status: 0,
    says: /^chat: accepted its key \S+ unchecked: it is this machine\n/,
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
    says: /unchecked: it is this machine\nchat: its certificate leads to no root/,
  },
  { certificate: "expired", host: "0.0.0.0", ca: true, status: 3, says: /expired on 2025-02-01/ },
  {
    certificate: "expired",
    host: "localhost",
    ca: true,
    status: 0,
    says: /unchecked: it is this machine\nchat: its certificate expired on 2025-02-01/,
  },
  { certificate: "early", host: "0.0.0.0", ca: true, status: 3, says: /is not valid before 2124-01-01/ },
  {
    certificate: "other",
    host: "localhost",
    ca: true,
    status: 0,
    says: /unchecked: it is this machine\nchat: its certificate is for elsewhere\.example/,
  },
  { certificate: "other", host: "0.0.0.0", ca: true, status: 3, says: /is for elsewhere\.example/ },
];

for (const runtime of Object.keys(RUNTIMES) as Runtime[]) {
  test(`join trusts or refuses each certificate of the practice PKI in the order of trust (${runtime})`, async (t) => {
    for (const { certificate, host, ca, status, says } of TRUST) {
      const identity = practice(certificate);
      const { port } = await serveHere(t, { identity, host: "0.0.0.0" });
      const env: Record<string, string> = ca ? { CHAT_CA: CA } : {};
      const unpinned = joinProcess(t, `ana@${host}:${port}`, [], { runtime, env });
      unpinned.end("hello\n");
      assert.equal(await unpinned.ended, status, `${certificate} as ${host}: ${unpinned.err.all}`);
      assert.match(unpinned.err.all, says, `${certificate} as ${host}`);
      if (status === 0) continue;
      assert.match(
        unpinned.err.all,
        new RegExp(`^chat: cannot verify this server: .*\nchat: hint: .* join ${host}:${port}/PIN`),
      );
      const pinned = joinProcess(t, `ana@${host}:${port}/${identity.pin}`, [], { runtime, env });
      pinned.end("hello\n");
      assert.equal(await pinned.ended, 0, `with a pin nothing else counts: ${pinned.err.all}`);
    }
  });

  test(`a wrong pin ends with status 3 before a byte is sent, even if a trusted root verifies the server (${runtime})`, async (t) => {
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

test("serve uses the operator's own certificate, and join verifies it by its root", async (t) => {
  const server = await serveProcess(t, [], {
    env: { CHAT_KEY: certs("server.key"), CHAT_CERT: certs("server.pem") + CA },
  });
  assert.equal(server.pin, practice("server").pin);
  const joining = joinProcess(t, `ana@localhost:${server.port}`, ["--explain"], { env: { CHAT_CA: CA } });
  joining.end("hi\n");
  assert.equal(await joining.ended, 0);
  assert.match(joining.err.all, /trusted +because its certificate leads to a trusted root and is for this name/);
  assert.doesNotMatch(joining.err.all, /unchecked/);
});

test("bad keys and certificates are refused at the start, with a hint", () => {
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
  assert.match(join(certs("server.pem")), /CHAT_CA is not that of an authority/);
  assert.match(
    join("ca.pem"),
    /CHAT_CA must hold the PEM text of a certificate, not its path\nchat: hint: export CHAT_CA=/,
  );
});

/** A server at an address that is not written as loopback, with a person at a terminal who joins it. */
async function comparing(t: TestContext): Promise<{ ana: Terminal; code: string; port: number }> {
  const identity = makeIdentity({});
  const { port } = await serveHere(t, { identity, host: "0.0.0.0" });
  const env = { CHAT_PASSWORD: "secret" };
  const ana = new Terminal(t, [BINARY, "join", `ana@0.0.0.0:${port}`], { columns: 120, env });
  await ana.wait(/-- cannot verify 0\.0\.0\.0: its certificate leads to no root that is trusted here\n/);
  return { ana, port, code: await checkCodeOf(identity.publicKey) };
}

test(
  "a person compares the check code, in any case and without its hyphen, and has three tries",
  wants("tmux"),
  async (t) => {
    const { ana, code, port } = await comparing(t);
    for (const wrong of ["", "mt4q-x7rz"]) {
      await ana.wait(/The check code on the server's screen:$/);
      ana.enter(wrong);
      await ana.wait(/-- that is not the check code of the server that answers here/);
    }
    ana.enter(code.toUpperCase().replace("-", " "));
    await ana.wait(/Welcome to #chat, ana/);
    assert.match(code, /^[a-z2-7]{4}-[a-z2-7]{4}$/);
    const eve = new Terminal(t, [BINARY, "join", `eve@0.0.0.0:${port}`], { columns: 120 });
    for (let at = 1; at <= LIMITS.codeTries; at++) {
      await eve.wait(new RegExp(`(screen: wrong\\d\n[^]*){${at - 1}}screen:$`));
      eve.enter(`wrong${at}`);
    }
    await eve.wait(/chat: this is not the server that you mean, or the code was mistyped\nchat: hint: .*\n\[exit 3\]/);
  },
);

test("serve prints the check code that join asks for, and it is the same for the same secret", async (t) => {
  const env = { CHAT_SECRET: "a secret of more than 24 characters" };
  const server = await serveProcess(t, [], { env });
  const [, code] = await server.err.wait(/^chat: check code: ([a-z2-7]{4}-[a-z2-7]{4}), which join asks for/m);
  assert.equal(code, await checkCodeOf(makeIdentity({ secret: env.CHAT_SECRET }).publicKey));
});

test(
  "an RSA key is trusted by its chain, and by no pin: serve prints neither pin nor code",
  wants("openssl"),
  async (t) => {
    const openssl = (...args: readonly string[]) => spawnSync("openssl", args, { encoding: "utf8" });
    const folder = fs.mkdtempSync(path.join(os.tmpdir(), "chat-rsa-"));
    t.after(() => fs.rmSync(folder, { recursive: true }));
    const [key, cert] = ["key.pem", "cert.pem"].map((name) => path.join(folder, name)) as [string, string];
    const names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"];
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, ...names);
    const [keyText, certText] = [key, cert].map((file) => fs.readFileSync(file, "utf8")) as [string, string];
    const port = await freePort();
    const env = { CHAT_KEY: keyText, CHAT_CERT: certText };
    const server = new Running(t, [BINARY, "serve", `0.0.0.0:${port}`], env);
    await server.err.wait(/to join: +\S+chat join \S+:\d+\n[^]*nothing is written to disk/);
    const trusted = joinProcess(t, `ana@localhost:${port}`, [], { env: { CHAT_CA: certText } });
    trusted.end("hello\n");
    assert.equal(await trusted.ended, 0, trusted.err.all);
    const pin = pinOf(new crypto.X509Certificate(certText).publicKey);
    for (const address of [`ana@0.0.0.0:${port}/${pin}`, `ana@localhost:${port}/${pin}`, `ana@0.0.0.0:${port}`]) {
      const refused = joinProcess(t, address);
      assert.equal(await refused.ended, 3, address);
      assert.match(
        refused.err.all,
        /key is neither P-256 nor Ed25519: no pin and no code is safe for it\nchat: hint: /,
      );
    }
    assert.doesNotMatch(server.err.all, /check code|[a-z2-7]{4}-[a-z2-7]{4}-/);
  },
);

// ---- An attacker between client and server

/** A TLS proxy with its own key, which relays every byte and records it. */
async function middle(
  t: TestContext,
  port: number,
  change = (chunk: Buffer) => chunk,
): Promise<{ port: number; seen: Text; code: string }> {
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
    code: await checkCodeOf(new crypto.X509Certificate(cert).publicKey),
  };
}

/** Whether what was sent contains the password: in clear, in hexadecimal, or in base64 at any offset. */
function leaks(seen: string, password: string): boolean {
  const secret = Buffer.from(password).toString("latin1");
  const inner = ["", "x", "xx"].map((before) => {
    const text = Buffer.from(before + password).toString("base64").replace(/=/g, "");
    return text.slice(Math.ceil(before.length * 8 / 6), Math.floor((before.length + secret.length) * 8 / 6));
  }); // its base64 at each of the three offsets, without the characters that its neighbours share
  const whole = [password, `\0ana\0${password}`, `ana\0ana\0${password}`].map((text) =>
    Buffer.from(text).toString("base64")
  );
  const decoded = seen.split(/\r?\n/).filter((line) => line.startsWith("AUTHENTICATE "))
    .map((line) => Buffer.from(line.slice(13), "base64").toString("latin1"));
  const hex = Buffer.from(password).toString("hex");
  return [seen, seen.replaceAll(/\r?\nAUTHENTICATE /g, ""), ...decoded].some((text) =>
    [secret, hex, ...inner, ...whole].some((form) => text.includes(form))
  );
}

test("the search for leaked passwords finds one in PASS, in SASL PLAIN and inside longer base64", () => {
  const password = "s3cr3t-pässwort";
  const sasl = (text: string) => `AUTHENTICATE ${Buffer.from(text).toString("base64")}\r\n`;
  const long = sasl(`${"x".repeat(290)}\0ana\0${password}`);
  const sent = [
    `PASS ${password}\r\n`,
    `PRIVMSG #chat :${password}\n`,
    sasl(`\0ana\0${password}`),
    sasl(`ana\0ana\0${password}`),
    sasl(password),
    ...["", "x", "xx"].map((before) => `REGISTER * * ${Buffer.from(`${before}${password}y`).toString("base64")}\r\n`),
    `${long.slice(0, 413)}\r\nAUTHENTICATE ${long.slice(413)}`,
  ];
  for (const text of sent) assert.ok(leaks(Buffer.from(text).toString("latin1"), password), text);
  assert.ok(!leaks("AUTHENTICATE SCRAM-SCRYPT-PLUS\r\nPASS x\r\n", password));
});

test(
  "a proxy between client and server gets neither a login nor the password, even if a person accepts its key",
  wants("tmux"),
  async (t) => {
    const { port, server } = await serveHere(t);
    const clean = joinProcess(t, `ana@127.0.0.1:${port}`, [], { password: "s3cr3t" });
    clean.end("registered over a clean connection\n");
    assert.equal(await clean.ended, 0);
    const proxy = await middle(t, port);

    const script = joinProcess(t, `ana@127.0.0.1:${proxy.port}`, [], { password: "s3cr3t" }); // loopback: trusted without a check
    script.end("x\n");
    assert.equal(await script.ended, 3);
    assert.match(script.err.all, /somebody sits between you and the server\nchat: hint: /);

    const careless = new Terminal(t, [BINARY, "join", `ana@0.0.0.0:${proxy.port}`], { columns: 200 });
    await careless.wait(/screen:$/);
    careless.enter(proxy.code);
    await careless.wait(/Password:$/);
    careless.enter("s3cr3t");
    await careless.wait(/somebody sits between you and the server[^]*\[exit 3\]/);

    assert.match(proxy.seen.all, /AUTHENTICATE SCRAM-SCRYPT-PLUS/);
    assert.ok(!leaks(proxy.seen.all, "s3cr3t"));
    assert.equal(server.accounts.find("ana")?.sessions.size, 0);

    // Replaying what it has recorded does not log it in: the proof is bound to another certificate and nonce.
    const messages = proxy.seen.all.split("\r\n").filter((line) =>
      line.startsWith("AUTHENTICATE ") && line.length > 60
    );
    const replay = tls.connect({ host: "127.0.0.1", port, rejectUnauthorized: false });
    const answers = new Text();
    replay.on("data", (chunk) => answers.add(chunk));
    replay.write(
      `CAP REQ sasl\r\nNICK ana\r\nUSER a 0 * :a\r\nAUTHENTICATE SCRAM-SCRYPT-PLUS\r\n${messages[0]}\r\n${
        messages.at(-1)
      }\r\n`,
    );
    await answers.wait(/ 904 /);
    replay.destroy();
  },
);

const NOT_A_CHAT_SERVER = /is an IRC server, but not a chat server\nchat: hint: an IRC client such as irssi gets in\n/;

test("a proxy that hides SCRAM gets no password: join takes the server for another IRC server", async (t) => {
  const { port } = await serveHere(t);
  const clean = joinProcess(t, `ana@127.0.0.1:${port}`, [], { password: "s3cr3t" });
  clean.end();
  assert.equal(await clean.ended, 0);
  const strip = (chunk: Buffer) => Buffer.from(chunk.toString("latin1").replace("SCRAM-SCRYPT-PLUS,", ""), "latin1");
  const proxy = await middle(t, port, strip);
  const script = joinProcess(t, `ana@127.0.0.1:${proxy.port}`, [], { password: "s3cr3t" });
  script.end("x\n");
  assert.equal(await script.ended, 1);
  assert.match(script.err.all, NOT_A_CHAT_SERVER);
  assert.match(proxy.seen.all, /sasl=SCRAM-SCRYPT-PLUS,PLAIN/); // before the proxy changed it
  assert.ok(!leaks(proxy.seen.all, "s3cr3t"));
});

// ---- A hostile server

const CHAT_CAPS = "message-tags echo-message batch server-time draft/chathistory";

/** What a hostile server offers in reply to CAP LS; undefined if it does not know CAP. */
const OFFERS: Readonly<Record<string, readonly string[] | undefined>> = {
  "PLAIN only": [`* LS :sasl=PLAIN ${CHAT_CAPS}`],
  "PLAIN and SCRAM": [`* LS :sasl=PLAIN,SCRAM-SCRYPT-PLUS ${CHAT_CAPS}`],
  "SCRAM without channel binding": [`* LS :sasl=PLAIN,SCRAM-SHA-256 ${CHAT_CAPS}`],
  "no SASL": [`* LS :${CHAT_CAPS}`],
  "SASL without mechanisms": [`* LS :sasl ${CHAT_CAPS}`],
  "no capability": ["* LS :"],
  "several lines": ["* LS * :sasl=PLAIN", `* LS * :${CHAT_CAPS}`, "* LS :sasl=SCRAM-SCRYPT-PLUS,PLAIN"],
  "no CAP": undefined,
};

const toBase64 = (text: string) => Buffer.from(text).toString("base64");

/** Lines by which a server could make a client try a password another way. */
const BAIT = [
  ":s 433 * ana :Nickname is already in use",
  ":s 464 ana :Password incorrect",
  ":s 451 * :You have not registered: send PASS first",
  ":s 904 ana :SASL authentication failed",
  ":s 908 ana PLAIN :are available SASL mechanisms",
  ":s 903 ana :SASL authentication successful",
  ":s 906 ana :SASL authentication aborted",
  ":s 001 ana :Welcome",
  ":s NOTICE ana :Send PASS with your password, or /msg NickServ IDENTIFY password",
  ":s FAIL * ACCOUNT_REQUIRED_TO_CONNECT :A password is needed here",
  ":s FAIL REGISTER ACCOUNT_EXISTS ana :That nick has an account already",
  ":s FAIL REGISTER WEAK_PASSWORD ana :Send a password, not a verifier",
  ":s REGISTER VERIFICATION_REQUIRED ana :Send your password",
  ":s NOTE PASS PASSWORD_CHANGED :Your password is changed",
  ":s CAP ana LS :sasl=PLAIN",
  ":s CAP ana NEW :sasl=PLAIN",
  ":s CAP ana DEL :sasl",
  ":s CAP ana ACK :sasl",
  ":s CAP ana NAK :sasl",
  "AUTHENTICATE +",
  "AUTHENTICATE PLAIN",
  `AUTHENTICATE ${toBase64("e=unknown-user")}`,
  `AUTHENTICATE ${toBase64("e=invalid-proof")}`,
  `AUTHENTICATE ${toBase64(`r=x,s=${toBase64("x".repeat(16))},i=1`)}`,
  `AUTHENTICATE ${"x".repeat(400)}`,
  "ERROR :Send PASS first",
] as const;

/** The points of a conversation at which a server can send something else than is expected: connecting, and commands. */
const POINTS = [
  "connection",
  ..."CAP-LS CAP-REQ NICK USER mechanism first-message proof AUTHENTICATE-+ REGISTER CAP-END JOIN PRIVMSG".split(" "),
] as const;

interface Attack {
  /** What is offered on each connection; the last one on all that follow. */
  readonly offers: readonly string[];
  /** What is sent at a point, on every connection. */
  readonly bait: ReadonlyMap<string, readonly string[]>;
  /** The proper answer is not sent at these points. */
  readonly omits?: ReadonlySet<string>;
  readonly newline?: string;
  /** What the server takes for the account's verifier until somebody registers. */
  readonly verifier?: Verifier;
}

/** The verifier of an impostor that does not know the right one. */
const GUESSED: Verifier = { salt: Buffer.alloc(16), storedKey: Buffer.alloc(32), serverKey: Buffer.alloc(32) };

/**
 * A TLS server that behaves like a chat server, except for the attack: a client that registers can log in. It records
 * every byte received, and the points that were reached.
 */
class HostileServer {
  heard = "";
  readonly reached = new Set<string>();
  connections = 0;
  /** Called when a connection has ended. */
  onEnd: (() => void) | undefined;
  /** Called when a client has been welcomed. */
  onWelcome: ((socket: tls.TLSSocket) => void) | undefined;
  /** Sends lines on the latest connection. */
  send: (...lines: readonly string[]) => void = () => {};
  readonly #attack: Attack;
  readonly #identity: Identity;
  readonly #server: tls.Server;
  #verifier: Verifier | undefined;
  /** @param idleMs how long to wait for a silent client; a client in this process has some turns of the event loop */
  constructor(attack: Attack, identity: Identity = hostileIdentity, idleMs?: number) {
    this.#attack = attack;
    this.#verifier = attack.verifier;
    this.#identity = identity;
    const { key, cert } = identity;
    this.#server = tls.createServer({ key, cert, ALPNProtocols: ["irc"] }, (socket) => this.#serve(socket, idleMs));
    this.#server.on("tlsClientError", () => {});
  }
  async listen(port = 0): Promise<number> {
    this.#server.listen(port, "127.0.0.1");
    await once(this.#server, "listening");
    return (this.#server.address() as net.AddressInfo).port;
  }
  close(): void {
    this.#server.close();
  }
  #serve(socket: tls.TLSSocket, idleMs?: number): void {
    const { offers, bait, omits, newline = "\r\n" } = this.#attack;
    const offer = OFFERS[offers[Math.min(this.connections++, offers.length - 1)] ?? ""];
    const send = (...lines: readonly string[]) => lines.forEach((line) => socket.write(line + newline));
    this.send = send;
    const at = (point: string, ...answer: readonly string[]) => {
      this.reached.add(point);
      send(...bait.get(point) ?? [], ...omits?.has(point) ? [] : answer);
    };
    const sasl = (message: string) => `AUTHENTICATE ${toBase64(message)}`;
    let scram: Generator<string, string, string> | undefined;
    let messages = 0; // of the SASL exchange
    const answer = (text: string) => {
      const { command, params, tags } = parse(text);
      const [first = "", second = ""] = params;
      if (command === "CAP" && first === "LS") {
        at("CAP-LS", ...offer?.map((line) => `:s CAP ${line}`) ?? [":s 421 * CAP :Unknown command"]);
      } else if (command === "CAP" && first === "REQ") at("CAP-REQ", `:s CAP ana ACK :${second}`);
      else if (command === "CAP" && first === "END") {
        at("CAP-END", ":s 001 ana :Welcome", ":s 376 ana :End", ":ana!ana@h JOIN #chat", ":s 353 ana = #chat :ana");
        send(":s 366 ana #chat :End");
        this.onWelcome?.(socket);
      } else if (command === "NICK" || command === "USER") at(command);
      else if (command === "REGISTER") {
        const verifier = readVerifier(params[2] ?? "");
        if (typeof verifier === "object") this.#verifier = verifier;
        at("REGISTER", ":s REGISTER SUCCESS ana :Account created");
      } else if (command === "AUTHENTICATE" && /^[A-Z]/.test(first) && !first.endsWith("=") && first.includes("-")) {
        scram = scramServer(() => this.#verifier, this.#identity.binding);
        scram.next();
        messages = 0;
        at("mechanism", "AUTHENTICATE +");
      } else if (command === "AUTHENTICATE" && first === "+") at("AUTHENTICATE-+", ":s 903 ana :Logged in");
      else if (command === "AUTHENTICATE") {
        const message = scram?.next(Buffer.from(first, "base64").toString()).value || "e=other-error";
        at(
          messages++ ? "proof" : "first-message",
          sasl(message),
          ...message.startsWith("e=") ? [":s 904 ana :No"] : [],
        );
      } else if (command === "JOIN") at("JOIN", `:ana!ana@h JOIN ${first}`, `:s 366 ana ${first} :End`);
      else if (command === "PRIVMSG") {
        const once = tags.get("chat.local/once");
        at("PRIVMSG", `@chat.local/once=${once} :ana!ana@h PRIVMSG ${first} :${second}`);
      } else if (command === "QUIT") socket.end();
    };
    let rest = "";
    let idleTurns = 0;
    const turn = () => {
      if (++idleTurns > IDLE_TURNS) socket.destroy();
      else if (!socket.destroyed) setImmediate(turn);
    };
    if (idleMs === undefined) turn();
    else socket.setTimeout(idleMs, () => socket.destroy());
    socket.on("error", () => {});
    socket.on("close", () => this.onEnd?.());
    socket.on("data", (chunk: Buffer) => {
      idleTurns = 0;
      this.heard += chunk.toString("latin1");
      const lines = (rest + chunk.toString("latin1")).split("\r\n");
      rest = lines.pop() ?? "";
      lines.forEach(answer);
    });
    at("connection");
  }
}
const hostileIdentity = makeIdentity({});
const IDLE_TURNS = 50;

/** A user interface without a screen: a pipe, or a person who answers every question at once. */
class WillingUi implements Ui {
  readonly hasPerson: boolean;
  readonly questions: string[] = [];
  readonly #answers: (question: string) => string | undefined | Promise<string>;
  #events: UiEvents | undefined;
  #accepts = false;
  constructor(hasPerson: boolean, answers: (question: string) => string | undefined | Promise<string>) {
    this.hasPerson = hasPerson;
    this.#answers = answers;
  }
  listen(events: UiEvents): void {
    this.#events = events;
  }
  acceptLines(): void {
    if (!this.#accepts) this.#events?.onLines(["hello"], this.hasPerson ? "typed" : "text");
    if (!this.#accepts && !this.hasPerson) this.#events?.onEnd?.();
    this.#accepts = true;
  }
  ask(question: Clean): Promise<string | undefined> {
    this.questions.push(question);
    return Promise.resolve(this.hasPerson && this.questions.length < 20 ? this.#answers(question) : undefined);
  }
  message(): void {}
  note(): void {}
  welcome(): void {}
  close(): void {}
}

const describe = ({ bait, omits, ...attack }: Attack) =>
  JSON.stringify({ ...attack, bait: [...bait], omits: [...omits ?? []] });

/** Every offer, then every bait at every point (before the proper answer, and instead of it), then random orders. */
function* attacks(below: (limit: number) => number, orders: number): Generator<Attack> {
  for (const offer of Object.keys(OFFERS)) yield { offers: [offer], bait: new Map() };
  for (const line of BAIT) {
    for (const offer of ["PLAIN only", "no CAP"]) yield { offers: [offer], bait: new Map([["connection", [line]]]) };
    for (const point of POINTS) {
      yield { offers: ["PLAIN and SCRAM", "PLAIN only"], bait: new Map([[point, [line]]]), newline: "\n" };
      yield { offers: ["PLAIN and SCRAM"], bait: new Map([[point, [line]]]), omits: new Set([point]) };
    }
  }
  const one = <T>(list: readonly T[]) => list[below(list.length)] as T;
  const several = <T>(list: readonly T[], most: number) => Array.from({ length: 1 + below(most) }, () => one(list));
  for (let order = 0; order < orders; order++) {
    yield {
      offers: below(3) ? ["PLAIN and SCRAM", one(Object.keys(OFFERS))] : several(Object.keys(OFFERS), 3),
      bait: new Map(several(POINTS, 4).map((point) => [point, several(BAIT, 4)])),
      omits: new Set(below(2) ? several(POINTS, 2) : []),
      newline: one(["\r\n", "\n", "\r"]),
      ...below(2) ? { verifier: GUESSED } : {},
    };
  }
}

test("join never sends a password, whatever a hostile server offers and in whatever order it sends its lines", async (t) => {
  quickScrypt(t);
  const password = "s3cr3t-pässwort";
  const seed = Number(process.env["FUZZ_SEED"] ?? Math.floor(Math.random() * 2 ** 31));
  const reached = new Map<string, number>();
  let tried = 0;
  const attempt = async (attack: Attack, hasPerson: boolean) => {
    const words = `seed ${seed}, ${hasPerson ? "at a terminal" : "in a pipe"}: ${describe(attack)}`;
    const server = new HostileServer(attack);
    const port = await server.listen();
    const leave = new AbortController();
    server.onEnd = () => server.connections >= 3 && leave.abort();
    const ui = new WillingUi(hasPerson, (question) => /nick/i.test(question) ? "ana" : password);
    const who = hasPerson ? {} : { nick: "ana", password };
    const options = { host: "127.0.0.1", port, ui, signal: leave.signal, backOffMs: () => 0, ...who };
    const status = await join(options).catch((error: unknown) => {
      assert.ok(error instanceof Fault, `${words}: ${error instanceof Error ? error.stack : error}`);
      return error.status;
    });
    server.close();
    assert.ok([0, 1, 2, 3].includes(status), words);
    assert.ok(!leaks(server.heard, password), `${words}\n${server.heard}`);
    assert.doesNotMatch(server.heard, /^PASS|^AUTHENTICATE PLAIN/m, words);
    for (const question of ui.questions) {
      assert.match(
        question,
        /^(Nick|Password|ana is free\. Repeat the password to register|Password of \S+): $/,
        words,
      );
    }
    for (const point of server.reached) reached.set(point, (reached.get(point) ?? 0) + 1);
    tried++;
  };
  const waiting = attacks(random(seed), Number(process.env["ORDERS"] ?? 150));
  const work = async () => {
    for (const attack of waiting) for (const hasPerson of [false, true]) await attempt(attack, hasPerson);
  };
  await Promise.all(Array.from({ length: 16 }, work));
  t.diagnostic(`${tried} conversations, seed ${seed}; reached ${JSON.stringify([...reached])}`);
  for (const point of POINTS) assert.ok((reached.get(point) ?? 0) >= 20, `${point} was reached too seldom`);
});

const HOSTILE: readonly (Attack & { readonly what: string })[] = [
  { what: "offers PLAIN only", offers: ["PLAIN only"], bait: new Map() },
  { what: "does not know CAP and demands PASS", offers: ["no CAP"], bait: new Map([["CAP-LS", [BAIT[1], BAIT[2]]]]) },
  { what: "offers SASL without mechanisms", offers: ["SASL without mechanisms"], bait: new Map() },
];

for (const { what, ...attack } of HOSTILE) {
  test(
    `join ends with status 1 on a server that ${what}, without asking for a password or sending it`,
    wants("tmux"),
    async (t) => {
      const server = new HostileServer(attack, hostileIdentity, 5000);
      const port = await server.listen();
      t.after(() => server.close());
      const expected = `127.0.0.1:${port} is an IRC server, but not a chat server`;
      const script = joinProcess(t, `ana@127.0.0.1:${port}`, [], { password: "s3cr3t" });
      script.end("x\n");
      assert.equal(await script.ended, 1);
      assert.ok(script.err.all.endsWith(`\nchat: ${expected}\nchat: hint: an IRC client such as irssi gets in\n`));
      assert.equal(script.out.all, "");
      for (const env of [{ CHAT_PASSWORD: "s3cr3t" }, {}]) {
        const ana = new Terminal(t, [BINARY, "join", `ana@127.0.0.1:${port}`], { columns: 120, env });
        await ana.wait(new RegExp(`chat: ${expected}\nchat: hint: an IRC client such as irssi gets in\n\\[exit 1\\]`));
        assert.doesNotMatch(ana.screen({ history: true }), /password/i);
      }
      assert.match(server.heard, /^CAP LS 302\r\n/);
      assert.ok(!leaks(server.heard, "s3cr3t"));
    },
  );
}

test(
  "a person types the password at a terminal, and a server that refuses SCRAM does not get it",
  wants("tmux"),
  async (t) => {
    const demands = [BAIT[3], BAIT[4], BAIT[1], "AUTHENTICATE +"];
    const bait = new Map([["first-message", demands], ["proof", demands], ["REGISTER", demands]]);
    for (const omits of [new Set(["first-message"]), new Set(["proof"]), new Set(["REGISTER"])]) {
      const server = new HostileServer({ offers: ["PLAIN and SCRAM"], bait, omits }, hostileIdentity, 5000);
      const port = await server.listen();
      t.after(() => server.close());
      const ana = new Terminal(t, [BINARY, "join", `ana@127.0.0.1:${port}`], { columns: 120 });
      await ana.wait(/Password:$/);
      ana.enter("s3cr3t");
      await ana.wait(/\[exit [13]\]/);
      assert.match(server.heard, /AUTHENTICATE SCRAM-SCRYPT-PLUS/);
      assert.ok(!leaks(server.heard, "s3cr3t"));
      assert.doesNotMatch(ana.screen({ history: true }), /s3cr3t/);
    }
  },
);

/** Lines of which a server sends more and more once the client is in, and what join says about it in the end. */
const GROWTH: readonly (readonly [what: string, says: RegExp, lines: (count: number) => string])[] = [
  [
    "a batch that never ends",
    /it sends more history than was asked for/,
    (at) => at ? `@batch=1 :bo!b@c PRIVMSG #chat :${"y".repeat(400)}` : ":s BATCH +1 chathistory #chat",
  ],
  ["people without end", /it names too many people/, (at) => `@x=${"y".repeat(500)} :u${at}!b@c JOIN #chat`],
  ["names without end", /it names too many people/, (at) => `:s 353 ana = #chat :a${at} b${at} c${at} d${at}`],
  ["rooms without end", /it says that we are in too many rooms/, (at) => `:ana!a@c JOIN #r${at}`],
  ["PINGs whose answers it does not read", /it does not read what it is sent/, () => `PING :${"p".repeat(500)}`],
];

for (const [what, says, line] of GROWTH) {
  test(`join disconnects from a server that sends ${what}, says why, and its memory stays bounded`, async (t) => {
    const attack: Attack = { offers: ["PLAIN and SCRAM"], bait: new Map() };
    const server = new HostileServer(attack, hostileIdentity, 60_000);
    let count = 0;
    server.onWelcome = (socket) => {
      socket.pause();
      const more = () => {
        const text = Array.from({ length: 200 }, () => `${line(count++)}\r\n`).join("");
        if (socket.destroyed) return;
        if (socket.write(text)) setImmediate(more);
        else socket.once("drain", more);
      };
      more();
    };
    const port = await server.listen();
    t.after(() => server.close());
    const script = joinProcess(t, `ana@127.0.0.1:${port}`);
    await script.err.wait(says);
    const status = fs.readFileSync(`/proc/${script.child.pid}/status`, "utf8");
    const peakMiB = Number(/VmHWM:\s+(\d+)/.exec(status)?.[1]) / 1024;
    t.diagnostic(`${count} lines, ${Math.round(peakMiB)} MiB`);
    assert.ok(peakMiB < 300, `${peakMiB} MiB`);
  });
}

test("join gives up a server whose CAP LS never ends", async (t) => {
  const clock = new FakeClock();
  const attack: Attack = { offers: ["PLAIN and SCRAM"], bait: new Map(), omits: new Set(["CAP-LS"]) };
  const server = new HostileServer(attack, hostileIdentity, 60_000);
  const port = await server.listen();
  t.after(() => server.close());
  const ui = new WillingUi(false, () => undefined);
  const result = join({ host: "127.0.0.1", port, ui, nick: "ana", password: "secret", clock }).catch(String);
  await until(() => server.reached.has("CAP-LS"), () => "it did not ask");
  server.send(...Array.from({ length: 5000 }, (_, at) => `:s CAP * LS * :cap${at}`));
  clock.tick(LIMITS.joinMs);
  assert.match(String(await result), /it does not answer as a chat server does/);
});

test("join gives up a server that sends too much while a person is asked for the password", async (t) => {
  const attack: Attack = { offers: ["PLAIN and SCRAM"], bait: new Map() };
  const server = new HostileServer(attack, hostileIdentity, 60_000);
  const port = await server.listen();
  t.after(() => server.close());
  const answered = Promise.withResolvers<string>();
  const ui = new WillingUi(true, () => answered.promise);
  const result = join({ host: "127.0.0.1", port, ui, nick: "ana" }).catch(String);
  await until(() => ui.questions.length > 0, () => "it did not ask");
  const ended = new Promise((end) => server.onEnd = () => end(undefined));
  server.send(...Array.from({ length: 2000 }, () => `:s NOTICE * :${"x".repeat(400)}`));
  await ended;
  server.close();
  answered.resolve("secret");
  assert.match(String(await result), /cannot join|sends more than can be read/);
});

test("a server that returns with the same key and without SCRAM does not get the password", async (t) => {
  const identity = makeIdentity({});
  const { port, stop } = await serveHere(t, { identity });
  const script = joinProcess(t, `ana@127.0.0.1:${port}/${identity.pin}`, [], { password: "s3cr3t" });
  await script.err.wait(/in #chat/);
  const impostor = new HostileServer({ offers: ["PLAIN only"], bait: new Map() }, identity, 5000);
  await stop("restarting");
  await impostor.listen(port);
  t.after(() => impostor.close());
  assert.equal(await script.ended, 1);
  assert.match(script.err.all, NOT_A_CHAT_SERVER);
  assert.ok(!leaks(impostor.heard, "s3cr3t"));
});

test("join says why a login is refused, and for how many seconds", async (t) => {
  const { port, server } = await serveHere(t);
  await enter(t, port, "ana", "", "right");
  server.accounts.find("ana")?.networks.clear();
  for (let at = 0; at < LIMITS.triesPerAccount; at++) {
    await server.accounts.login("ana", "wrong", { address: "127.0.0.1", closed: false });
  }
  const script = joinProcess(t, `ana@127.0.0.1:${port}`, [], { password: "right" });
  assert.equal(await script.ended, 1);
  assert.match(script.err.all, /\nchat: too many attempts: try again in \d\d s\n/);
});

test("an impostor that does not know the password's verifier is detected, and join ends with status 3", async (t) => {
  const forged = `AUTHENTICATE ${toBase64(`v=${Buffer.alloc(32).toString("base64")}`)}`;
  const attack = { offers: ["PLAIN and SCRAM"], bait: new Map([["proof", [forged]]]), omits: new Set(["proof"]) };
  const impostor = new HostileServer({ ...attack, verifier: GUESSED, newline: "\n" }, hostileIdentity, 5000);
  const port = await impostor.listen();
  t.after(() => impostor.close());
  const script = joinProcess(t, `ana@127.0.0.1:${port}`, [], { password: "s3cr3t" });
  script.end("x\n");
  assert.equal(await script.ended, 3);
  assert.match(script.err.all, /this server does not know the password\nchat: hint: it may stand in for the right one/);
  assert.ok(!leaks(impostor.heard, "s3cr3t"));
});

test("an attacker who intercepts a registration can take the nick, but does not learn the password", async (t) => {
  const { port, server } = await serveHere(t);
  // The attacker answers with a server of its own, and registers the nick on the real one for itself.
  const fake = await serveHere(t, { identity: makeIdentity({}) });
  const victim = joinProcess(t, `ana@127.0.0.1:${fake.port}`, [], { password: "s3cr3t" });
  victim.end("I think that I am in the room\n");
  assert.equal(await victim.ended, 0, "the victim does not notice it");
  await enter(t, port, "ana", "", "the attacker's own");
  assert.ok(server.accounts.find("ana"), "the attacker has the nick");
  const verifier = fake.server.accounts.find("ana")?.verifier;
  assert.ok(verifier, "and a verifier, from which the password cannot be read");
  const later = joinProcess(t, `ana@127.0.0.1:${port}`, [], { password: "s3cr3t" });
  later.end("x\n");
  assert.equal(await later.ended, 1);
  assert.match(later.err.all, /wrong password for ana/);
});

// ---- What can be observed

test("--explain tells the steps of a connection on both sides, with the right numbers, and never a password", async (t) => {
  for (const runtime of Object.keys(RUNTIMES) as Runtime[]) {
    const server = await serveProcess(t, ["--explain"], { runtime });
    const joining = joinProcess(t, `ana@127.0.0.1:${server.port}`, ["--explain"], { runtime, password: "hunter7" });
    joining.end("needle\n");
    assert.equal(await joining.ended, 0);
    const printed = joining.err.all;
    const steps = [
      /chat: 1 TCP: .*\nchat: {3}TCP +127\.0\.0\.1:\d+ to 127\.0\.0\.1:\d+\n/,
      /chat: 2 ClientHello and ServerHello: .*\nchat: {3}protocol +TLSv1\.3\nchat: {3}cipher +TLS_\w+, .*\n/,
      /chat: {3}ALPN +irc\n/,
      /chat: 3 certificate: .*\nchat: {3}certificate +CN=chat\nchat: {3}issued by +itself\nchat: {3}valid +.* to .*\n/,
      new RegExp(`chat: {3}public key +ec \\S+\nchat: {3}SHA-256 +[A-Za-z0-9+/]{43}=\nchat: {3}pin +${server.pin}\n`),
      /chat: {3}trusted +because it is on this machine\n/,
      /chat: 4 keys: .* neither has sent them; what follows is encrypted\n/,
      /chat: 5 login: .*\n/,
      /chat: registered: the server keeps a verifier, and did not get the password\n/,
      /chat: 6 the room: .*\n/,
      /chat: → @… PRIVMSG #chat :needle {2}\((\d+) bytes\) → \d+-byte TLS record: 5 header \+ \d+ \+ 1 type \+ 16 tag\n/,
    ];
    let from = 0;
    for (const step of steps) {
      const found = step.exec(printed.slice(from));
      assert.ok(found, `${runtime}: no ${step} in ${printed.slice(from)}`);
      from += found.index;
    }
    for (const [, clear, record] of printed.matchAll(/\((\d+) bytes\) → (\d+)-byte/g)) {
      assert.equal(Number(record), Number(clear) + 22);
    }
    if (runtime === "node" || runtime === "binary") assert.match(printed, /key exchange +X25519MLKEM768\n/);
    await server.err.wait(/ 1 TCP: [^]* 4 keys: [^]* 5 login: ana and we proved to each other/);
    await server.err.wait(/ 6 the room: one event loop .* there is no thread for ana\n/);
    assert.match(server.err.all, /127\.0\.0\.1:\d+ (wrote|read) \(\d+ bytes\) → /);
    assert.doesNotMatch(server.err.all, /needle/);
    assert.doesNotMatch(printed + server.err.all, /hunter7|U\+FFFD|\ufffd/);
  }
});

test("--explain folds what repeats, and hides what belongs to the login", async (t) => {
  const { port } = await serveHere(t);
  const joining = joinProcess(t, `ana@127.0.0.1:${port}`, ["--explain"]);
  joining.end(Array.from({ length: 20 }, (_, at) => `line ${at}\n`).join(""));
  assert.equal(await joining.ended, 0);
  const sent = joining.err.all.match(/→ @… PRIVMSG #chat :line \d+/g) ?? [];
  assert.equal(sent.length, LIMITS.shownOfKind);
  assert.match(joining.err.all, /chat: … \d+ more of the kind\n/);
  assert.doesNotMatch(joining.err.all, /(AUTHENTICATE|REGISTER \* \*) \w{9,}/);
});

test("the SHA-256 of the key in --explain is the one that GnuTLS prints", wants("gnutls-cli"), async (t) => {
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
  assert.ok(joining.err.all.includes(`SHA-256       ${hash}`));
});

const root = { ...wants("tshark"), ...process.getuid?.() === 0 ? {} : { skip: "capturing needs root" } };
test("a captured connection can be decrypted with the keys of --keylog, and cannot without them", root, async (t) => {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "chat-capture-"));
  t.after(() => fs.rmSync(folder, { recursive: true }));
  const [capture, keys] = [path.join(folder, "capture.pcapng"), path.join(folder, "keys.txt")];
  const server = await serveProcess(t, ["--keylog"]);
  assert.match(server.err.all, /warning: the TLS keys go to standard error/);
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
  await server.err.wait(/CLIENT_TRAFFIC_SECRET_0[^]*CLIENT_TRAFFIC_SECRET_0/);
  fs.writeFileSync(keys, server.err.all);
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

test("--keylog is a usage error on Deno, which does not provide the keys", () => {
  for (const args of [["serve", ":0", "--keylog"], ["join", "ana@127.0.0.1:1", "--keylog"]]) {
    const [file = "", ...first] = RUNTIMES.deno();
    const { status, stderr } = spawnSync(file, [...first, ...args], { env: environment(), encoding: "utf8" });
    assert.equal(status, 2);
    assert.match(stderr, /--keylog is not possible on Deno\nchat: hint: /);
  }
});

test(
  "a person who answers after the server has given up the connection is reconnected without a message",
  wants("tmux"),
  async (t) => {
    const clock = new FakeClock();
    const { port, server } = await serveHere(t, { clock });
    const ana = new Terminal(t, [BINARY, "join", `127.0.0.1:${port}`], { columns: 100 });
    await ana.wait(/Nick:$/);
    ana.enter("ana");
    await ana.wait(/Password:$/);
    assert.equal(server.sessions.size, 1);
    for (let silent = 0; silent <= LIMITS.silenceMs; silent += LIMITS.sleepMs) {
      clock.tick(LIMITS.sleepMs);
      server.sweep();
    }
    assert.equal(server.sessions.size, 0);
    ana.enter("secret");
    await ana.wait(/to register:$/);
    ana.enter("secret");
    await ana.wait(
      /unchecked: it is this machine\nNick: ana\nPassword:\nana is free\. Repeat the password to register:\nWelcome/,
    );
  },
);

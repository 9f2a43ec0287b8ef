// The program as a process: its output, its exit status and its error messages, on every runtime where they differ.
import assert from "node:assert/strict";
import { execFileSync, spawnSync } from "node:child_process";
import { once } from "node:events";
import fs from "node:fs";
import net from "node:net";
import os from "node:os";
import path from "node:path";
import { test, type TestContext } from "node:test";
import tls from "node:tls";
import { LIMITS, main, selfSigned, VERSION } from "../chat.ts";
import * as help from "./helpers.ts";
import {
  BINARY,
  enter,
  environment,
  freePort,
  joinProcess,
  ROOT,
  RUNTIMES,
  serveHere,
  serveProcess,
  WAIT_MS,
  wants,
} from "./helpers.ts";
import { generateKeyPairSync } from "node:crypto";

const EVERY = Object.keys(RUNTIMES) as readonly help.Runtime[];

/** Runs the program to its end. */
function run(args: readonly string[], env: Readonly<Record<string, string>> = {}, runtime: help.Runtime = "binary") {
  const [file = "", ...first] = RUNTIMES[runtime]();
  const { status, stdout, stderr } = spawnSync(file, [...first, ...args], {
    env: environment(env),
    encoding: "utf8",
    timeout: WAIT_MS,
  });
  return { status, stdout, stderr };
}

/** Another server than `chat serve`, on a free port. */
async function other(t: TestContext, server: net.Server): Promise<number> {
  const sockets = new Set<net.Socket>();
  server.on("connection", (socket) => {
    sockets.add(socket);
    socket.on("error", () => {});
  });
  server.on("tlsClientError", () => {});
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  t.after(() => {
    server.close();
    for (const socket of sockets) socket.destroy();
  });
  return (server.address() as net.AddressInfo).port;
}

/** Waits until something listens on a port, which a server without a log cannot announce. */
async function untilListening(port: number): Promise<void> {
  for (const late = performance.now() + WAIT_MS; performance.now() < late;) {
    const socket = net.connect(port, "127.0.0.1");
    const listens = await new Promise((resolve) => {
      socket.on("connect", () => resolve(true)).on("error", () => resolve(false));
    });
    socket.destroy();
    if (listens) return;
  }
  throw new Error(`nothing listens on port ${port}`);
}

const privateKey = generateKeyPairSync("ec", { namedCurve: "P-256" }).privateKey;
const SELF_SIGNED = { key: privateKey.export({ type: "pkcs8", format: "pem" }), cert: selfSigned(privateKey) };

test("chat.ts imports three modules, and loads no other in any way", () => {
  const source = fs.readFileSync(path.join(ROOT, "chat.ts"), "utf8");
  const imports = [...source.matchAll(/from "([^"]+)"/g)].map(([, name]) => name);
  assert.deepEqual(imports, ["node:crypto", "node:readline", "node:tls"]);
  assert.doesNotMatch(source, /\brequire\s*\(|\bimport\s*\(|getBuiltinModule|process\.binding|\beval\b|new Function/);
});

test("the version in chat.ts is that in package.json", () => {
  assert.equal(VERSION, JSON.parse(fs.readFileSync(path.join(ROOT, "package.json"), "utf8")).version);
});

for (const runtime of EVERY) {
  test(`version and help print to standard output and end with status 0 (${runtime})`, () => {
    for (const args of [["version"], ["--version"]]) {
      assert.deepEqual(run(args, {}, runtime), { status: 0, stdout: `chat ${VERSION}\n`, stderr: "" });
    }
    assert.match(run(["help"], {}, runtime).stdout, /chat serve .*\n +chat join /);
  });
}

test("help lists every option, whichever way it is requested", () => {
  for (const args of [["help", "serve"], ["serve", "--help"], ["serve", "-h"]]) {
    const { status, stdout, stderr } = run(args);
    assert.deepEqual([status, stderr], [0, ""]);
    for (
      const option of [
        "--room",
        "--topic",
        "--name",
        "--history",
        "--max-clients",
        "--per-address",
        "--rate",
        "--accounts",
        "--lock",
        "--explain",
        "--keylog",
      ]
    ) {
      assert.match(stdout, new RegExp(`^  ${option} `, "m"));
    }
    assert.match(stdout, /openssl rand/);
    assert.ok(stdout.split("\n").every((line) => line.length <= 80), stdout);
  }
  for (const option of ["--nick", "--room", "--commands", "--listen", "--plain", "--explain", "--keylog"]) {
    assert.match(run(["help", "join"]).stdout, new RegExp(`^  ${option} `, "m"));
  }
});

test("a usage error names the wrong word, suggests the nearest right one, and ends with status 2", () => {
  const wrong: readonly (readonly [readonly string[], RegExp])[] = [
    [[], /^chat: serve or join\?\nchat: hint: \S+chat help\n$/],
    [["sevre"], /there is no chat sevre\nchat: hint: did you mean \S+chat serve\?/],
    [["serve", "--romm", "x"], /chat serve has no option --romm\nchat: hint: did you mean --room\?/],
    [["constructor"], /there is no chat constructor\nchat: hint: \S+chat help\n/],
    [["verifier"], /chat: .* is not a nick\nchat: hint: /],
    [["verifier", "2fast"], /chat: "2fast" is not a nick\nchat: hint: /],
    [["serve", "--constructor"], /chat serve has no option --constructor\n/],
    [["serve", "--history", "many"], /--history cannot be "many"\nchat: hint: --history N: /],
    [["serve", "--history"], /--history cannot be ""/],
    [["serve", "--history=-1"], /--history cannot be "-1"/],
    [["serve", "--room", "a b"], /--room cannot be "a b"/],
    [["serve", "--explain=yes"], /--explain takes no value/],
    [["serve", "one", "two"], /one address is enough/],
    [["serve", "1:2:3"], /1:2:3 is not an address/],
    [["serve", ":70000"], /:70000 is not an address/],
    [["join"], /join which server\?/],
    [["join", "--timeout", "soon", "x"], /--timeout cannot be "soon"\nchat: hint: --timeout SECONDS: /],
    [["join", "--plian", "x"], /did you mean --plain\?/],
    [["join", "a b@x"], /a b is not a valid nick/],
    [["join", "x/short"], /short is not a pin/],
    [["join", "x:y"], /x:y is not an address/],
  ];
  for (const [args, message] of wrong) {
    const { status, stdout, stderr } = run(args);
    assert.deepEqual([status, stdout], [2, ""], args.join(" "));
    assert.match(stderr, message);
    assert.match(stderr, /^(chat: [^A-Z].*[^.]\n){2}$/);
  }
});

for (const runtime of EVERY) {
  test(`join explains in one line why it cannot join, with a hint, and ends with status 1 (${runtime})`, async (t) => {
    const irc = (...lines: readonly string[]) =>
      tls.createServer(SELF_SIGNED, (socket) => socket.once("data", () => socket.write(lines.join("\n") + "\n")));
    const notChat = /is an IRC server, but not a chat server\nchat: hint: an IRC client such as irssi gets in\n/;
    const cases: readonly (readonly [number, RegExp])[] = [
      [await freePort(), /nobody listens there/],
      [
        await other(t, net.createServer((socket) => socket.once("data", () => socket.end("HTTP/1.1 400 Bad\r\n\r\n")))),
        /it is not a TLS server/,
      ],
      [await other(t, tls.createServer({ ...SELF_SIGNED, maxVersion: "TLSv1.2" })), /does not know TLS 1\.3/],
      [await other(t, tls.createServer({ ...SELF_SIGNED, ALPNProtocols: ["http/1.1"] })), /is not a chat server/],
      [await other(t, net.createServer((socket) => socket.destroy())), /closed the connection/],
      [
        await other(t, tls.createServer(SELF_SIGNED, (socket) => socket.end("HTTP/1.1 400 Bad\r\n\r\n"))),
        /this is a web server/,
      ],
      [await other(t, tls.createServer(SELF_SIGNED, (socket) => socket.end())), /closed the connection/],
      [await other(t, irc(":s 421 * CAP :Unknown command")), notChat],
      [await other(t, irc(":s NOTICE * :Looking up your hostname", ":s CAP * LS :sasl=PLAIN,EXTERNAL")), notChat],
      [await other(t, irc(":s CAP * LS * :sasl=SCRAM-SCRYPT-PLUS", ":s CAP * LS :message-tags batch")), notChat],
    ];
    for (const [port, message] of cases) {
      const joining = joinProcess(t, `ana@127.0.0.1:${port}`, [], { runtime });
      joining.end("hello\n");
      assert.equal(await joining.ended, 1);
      const printed = joining.err.all.replace(/^chat: accepted its key .*\n/, "");
      assert.match(printed, message);
      assert.match(printed, /^chat: .*\nchat: hint: .*\n$/);
      assert.equal(joining.out.all, "");
    }
    const nowhere = joinProcess(t, "ana@nowhere.invalid", [], { runtime });
    assert.equal(await nowhere.ended, 1);
    assert.match(nowhere.err.all, /there is no such host/);
  });

  test(`serve explains that a port is in use, or that an address is not of this machine (${runtime})`, async (t) => {
    const server = await serveProcess(t);
    const again = run(["serve", `:${server.port}`], {}, runtime);
    assert.equal(again.status, 1);
    assert.match(
      again.stderr,
      new RegExp(`^chat: port ${server.port} is in use already\nchat: hint: .*${server.port + 1}.*\n$`),
    );
    const far = run(["serve", "192.0.2.1:0"], {}, runtime);
    assert.equal(far.status, 1);
    assert.match(far.stderr, /^chat: .*192\.0\.2\.1.*\nchat: hint: .*\n$/);
  });
}

test("serve prints how to join and logs who registers, logs in and leaves, but never a password or a message", async (t) => {
  const server = await serveProcess(t);
  assert.match(server.err.all, /^chat: serving #chat on 127\.0\.0\.1:\d+\n/);
  await server.err.wait(/nothing is written to disk/);
  await server.err.wait(
    /only this machine can join: to let others in, stop this and run \S+chat serve 0\.0\.0\.0:\d+\n/,
  );
  const ana = await enter(t, server.port, "ana", "", "S3cr3t");
  await server.err.wait(
    /^chat: \d\d:\d\d:\d\d ana registered from 127\.0\.0\.1\nchat: \d\d:\d\d:\d\d ana logged in from /m,
  );
  ana.send("PRIVMSG #chat :t0psecret words", "QUIT");
  await server.err.wait(/ana left from 127\.0\.0\.1: Quit\n/);
  const wrong = await help.dial(t, server.port);
  wrong.send("PASS An0ther", "NICK ana", "USER a 0 * :a");
  await server.err.wait(/ana was refused from 127\.0\.0\.1: wrong password\n/);
  server.child.kill("SIGTERM");
  assert.equal(await server.ended, 0);
  assert.match(server.err.all, /stopping\n/);
  assert.doesNotMatch(server.err.all + server.out.all, /S3cr3t|An0ther|t0psecret/);
  assert.equal(server.out.all, "");
});

for (const signal of ["SIGINT", "SIGTERM"] as const) {
  test(`on ${signal} the server notifies everybody and ends with status 0`, async (t) => {
    const server = await serveProcess(t);
    const ana = await enter(t, server.port, "ana");
    server.child.kill(signal);
    await ana.wait(/ERROR :The server is stopping\r\n/);
    await ana.closed;
    assert.equal(await server.ended, 0);
  });
}

test("without a terminal a server goes on after a hang-up, as nohup expects", async (t) => {
  const server = await serveProcess(t);
  const ana = await enter(t, server.port, "ana");
  server.child.kill("SIGHUP");
  server.child.kill("SIGHUP");
  await enter(t, server.port, "bo"); // both signals have arrived by now
  await ana.sync();
  assert.doesNotMatch(ana.all, /ERROR/);
});

for (const runtime of ["binary", "node", "deno"] as const) {
  test(`a server goes on when nobody reads its log any more (${runtime})`, async (t) => {
    const server = await serveProcess(t, [], { runtime });
    server.child.stderr?.destroy();
    const ana = await enter(t, server.port, "ana"); // its log lines cannot be written
    const bo = await enter(t, server.port, "bo");
    ana.send("PRIVMSG #chat :still here");
    await bo.wait(/PRIVMSG #chat :still here\r\n/);
    server.child.kill("SIGTERM");
    assert.equal(await server.ended, 0);
  });

  test(`a server and a client go on when the disk of their logs is full (${runtime})`, async (t) => {
    const full = ["sh", "-c", 'exec "$@" 2>/dev/full', "sh", ...RUNTIMES[runtime]()];
    const port = await freePort();
    const server = new help.Running(t, [...full, "serve", `127.0.0.1:${port}`]);
    await untilListening(port);
    const bo = await enter(t, port, "bo");
    const ana = new help.Running(t, [...full, "join", `ana@127.0.0.1:${port}`], { CHAT_PASSWORD: "secret" });
    ana.write("one\n");
    await bo.wait(/:ana!ana@chat PRIVMSG #chat :one\r\n/);
    ana.end("two\n");
    await bo.wait(/:ana!ana@chat PRIVMSG #chat :two\r\n/);
    assert.equal(await ana.ended, 0);
    server.child.kill("SIGTERM");
    assert.equal(await server.ended, 0);
  });
}

test("commands that are printed for copying begin as the program was invoked", (t) => {
  const scratch = fs.mkdtempSync(path.join(os.tmpdir(), "chat-invoked-"));
  t.after(() => fs.rmSync(scratch, { recursive: true }));
  fs.symlinkSync(BINARY, path.join(scratch, "chat"));
  fs.mkdirSync(path.join(scratch, "a b"));
  fs.symlinkSync(BINARY, path.join(scratch, "a b", "chat"));
  const [dist, node] = [path.join(ROOT, "dist"), process.execPath];
  const PATH = `${scratch}:${process.env["PATH"]}`;
  const cases: readonly (readonly [cwd: string, command: readonly string[], printed: string])[] = [
    [ROOT, ["dist/chat"], "dist/chat"],
    [dist, ["./chat"], "./chat"],
    [scratch, ["chat"], "chat"],
    [scratch, ["a b/chat"], "'a b/chat'"],
    [ROOT, [BINARY], BINARY],
    [ROOT, [node, "chat.ts"], "node chat.ts"],
    [dist, [node, path.join(dist, "chat.mjs")], "node chat.mjs"],
  ];
  for (const [cwd, [file = "", ...args], printed] of cases) {
    const { stderr } = spawnSync(file, args, { cwd, env: environment({ PATH }), encoding: "utf8", timeout: WAIT_MS });
    assert.equal(stderr, `chat: serve or join?\nchat: hint: ${printed} help\n`);
  }
});

test("commands that are printed for copying have an IPv6 address in brackets", async (t) => {
  const { port } = await serveHere(t);
  const unverified = joinProcess(t, `ana@[::ffff:127.0.0.1]:${port}`);
  assert.equal(await unverified.ended, 3);
  assert.match(unverified.err.all, new RegExp(`hint: \\S+ join \\[::ffff:127\\.0\\.0\\.1\\]:${port}/PIN`));
  const again = run(["serve", `[::ffff:127.0.0.1]:${port}`]);
  assert.match(again.stderr, new RegExp(`serve \\[::ffff:127\\.0\\.0\\.1\\]:${port + 1} takes another one`));
});

test("a server on all addresses prints a line to join with for each address that others can reach", async (t) => {
  const own = Object.values(os.networkInterfaces()).flat().filter((one) => one !== undefined && !one.internal)
    .map((one) => one?.address ?? "").filter((address) => !/^(169\.254|fe80)/.test(address));
  const ipv4 = own.filter((address) => !address.includes(":"));
  for (const [host, expected] of [["0.0.0.0", ipv4], ["[::]", own]] as const) {
    const server = await serveProcess(t, [], { address: `${host}:0` });
    await server.err.wait(/IRC clients: /);
    const lines = [...server.err.all.matchAll(/to join: +\S+chat join (\S+):\d+\/[a-z2-7-]{29}\n/g)];
    const printed = lines.map(([, address = ""]) => address.replace(/[[\]]/g, ""));
    assert.deepEqual(printed.toSorted(), expected.length ? [...new Set(expected)].sort() : ["ADDRESS"]);
  }
});

test("where the runtime does not list addresses, the line to join with says what to put in their place", async (t) => {
  const server = await serveProcess(t, [], { runtime: "deno", address: "0.0.0.0:0" });
  assert.match(server.err.all, /to join: +deno run \S+ \S+ chat\.ts join ADDRESS:\d+\//);
  await server.err.wait(/ADDRESS stands for an address of this machine: put it there\n/);
});

test("serve listens on the given address, also of IPv6, with the given room", async (t) => {
  const server = await serveProcess(t, ["--room", "lab", "--topic", "hi all", "--name", "Lab"], { address: "[::1]:0" });
  assert.match(server.err.all, /join \[::1\]:/);
  const joining = joinProcess(t, `ana@[::1]:${server.port}/${server.pin}`);
  joining.end("hello\n");
  assert.equal(await joining.ended, 0);
  assert.match(joining.err.all, /in #lab as ana/);
});

for (const server of EVERY) {
  for (const client of EVERY) {
    test(`a script talks through ${client} to a server on ${server}`, async (t) => {
      const serving = await serveProcess(t, [], { runtime: server });
      const reader = joinProcess(t, `bo@127.0.0.1:${serving.port}`, [], { runtime: client });
      await reader.err.wait(/in #chat as bo/);
      const script = joinProcess(t, `ana@127.0.0.1:${serving.port}/${serving.pin}`, [], { runtime: client });
      script.end("one\n/two is no command\nthrée\twith a tab\n\nfour");
      assert.equal(await script.ended, 0, script.err.all);
      assert.equal(script.out.all, "");
      const time = "\\d{4}-\\d\\d-\\d\\dT\\d\\d:\\d\\d:\\d\\d\\.\\d{3}Z";
      await reader.out.wait(
        new RegExp(
          `^${time}\t#chat\tana\tone\n${time}\t#chat\tana\t/two is no command\n${time}\t#chat\tana\tthrée with a tab\n${time}\t#chat\tana\tfour\n$`,
        ),
      );
      reader.end();
      assert.equal(await reader.ended, 0);
      assert.equal(reader.out.all.split("\n").length, 5);
    });
  }
}

test("join in a pipe without a nick or a password says what is missing, and ends with status 2", async (t) => {
  const { port } = await serveHere(t);
  const noNick = joinProcess(t, `127.0.0.1:${port}`);
  noNick.end("x\n");
  assert.equal(await noNick.ended, 2);
  assert.match(noNick.err.all, /no nick was given, and there is nobody to ask\nchat: hint: \S+chat join NICK@HOST\n/);
  const noPassword = joinProcess(t, `ana@127.0.0.1:${port}`, [], { password: "" });
  noPassword.end("x\n");
  assert.equal(await noPassword.ended, 2);
  assert.match(noPassword.err.all, /CHAT_PASSWORD/);
});

test("a script with a wrong password ends with status 1", async (t) => {
  const { port } = await serveHere(t);
  const first = joinProcess(t, `ana@127.0.0.1:${port}`);
  first.end("x\n");
  assert.equal(await first.ended, 0);
  const second = joinProcess(t, `ana@127.0.0.1:${port}`, [], { password: "other" });
  second.end("x\n");
  assert.equal(await second.ended, 1);
  assert.match(second.err.all, /wrong password for ana\nchat: hint: /);
});

test("a script without input joins, leaves and ends with status 0", async (t) => {
  const { port } = await serveHere(t);
  const script = joinProcess(t, `ana@127.0.0.1:${port}`);
  script.end();
  assert.equal(await script.ended, 0);
});

test("the first commands of a script wait until it knows the room", async (t) => {
  const { port } = await serveHere(t, { topic: "the day" });
  await enter(t, port, "bo");
  const script = joinProcess(t, `ana@127.0.0.1:${port}`, ["--commands"]);
  script.end("/who\n/topic\n/ignore bo\n");
  assert.equal(await script.ended, 0);
  assert.match(script.err.all, /\nchat: 2 people in #chat: .*\nchat: topic of #chat: the day\nchat: bo is ignored\n$/);
});

test("the first commands of a script with --room wait for that room, and /exit sends what waits", async (t) => {
  const { port } = await serveHere(t);
  const bo = await enter(t, port, "bo");
  bo.send("JOIN #lab");
  await bo.sync();
  const script = joinProcess(t, `ana@127.0.0.1:${port}`, ["--commands", "--room", "lab"]);
  const lines = Array.from({ length: 60 }, (_, at) => `line ${at}.`);
  script.end(`/who\n${lines.join("\n")}\n/exit that was it\n`);
  assert.equal(await script.ended, 0, script.err.all);
  assert.match(script.err.all, /\nchat: 2 people in #lab: /);
  await bo.wait(/PRIVMSG #lab :line 59\.\r\n/);
  await bo.wait(/:ana!ana@chat QUIT :Quit: that was it\r\n/);
});

test("who has left all rooms on one device lands in the first one with the next", async (t) => {
  const { port } = await serveHere(t);
  const first = await enter(t, port, "ana");
  first.send("PART #chat");
  await first.sync();
  const script = joinProcess(t, `ana@127.0.0.1:${port}`);
  script.end("hello\n");
  assert.equal(await script.ended, 0, script.err.all);
});

test("a listener and a verifier whose output cannot be written say so, and end with status 1", async (t) => {
  const { port } = await serveHere(t);
  const bo = await enter(t, port, "bo");
  const full = ["sh", "-c", 'exec "$@" >/dev/full', "sh", BINARY];
  const listener = new help.Running(t, [...full, "join", `ana@127.0.0.1:${port}`, "--listen"], { CHAT_PASSWORD: "x" });
  await bo.wait(/:ana!ana@chat JOIN #chat\r\n/);
  bo.send("PRIVMSG #chat :hello", "PRIVMSG #chat :again");
  assert.equal(await listener.ended, 1);
  assert.match(listener.err.all, /\nchat: standard output cannot be written: .*ENOSPC.*\n$/);
  assert.equal(listener.err.all.match(/cannot be written/g)?.length, 1);
  const verifier = new help.Running(t, [...full, "verifier", "ana"], { CHAT_PASSWORD: "x" });
  assert.equal(await verifier.ended, 1);
  assert.equal(verifier.err.all, "chat: the line could not be written\n");
});

test("a script with a command that cannot be done says why, and ends with status 1", async (t) => {
  const { port } = await serveHere(t);
  for (const command of ["/msg 1up hi", "/r hi", "/join #", "/topci x"]) {
    const script = joinProcess(t, `ana@127.0.0.1:${port}`, ["--commands"]);
    script.end(`${command}\n`);
    assert.equal(await script.ended, 1, command);
    assert.match(script.err.all, /not a valid n|nobody has written|there is no/);
  }
});

test("a script sends QUIT and ends with status 0 on SIGINT and on SIGTERM", async (t) => {
  const { port } = await serveHere(t);
  const bo = await enter(t, port, "bo");
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    const script = joinProcess(t, `ana@127.0.0.1:${port}`);
    await script.err.wait(/in #chat as ana/);
    script.child.kill(signal);
    assert.equal(await script.ended, 0);
    await bo.wait(/:ana!ana@chat QUIT :Quit\r\n/);
  }
});

test("a long line of a script is sent in several messages, split between words, or else between grapheme clusters", async (t) => {
  const { port } = await serveHere(t);
  const bo = await enter(t, port, "bo");
  const text = `${"👩‍👩‍👧‍👦 né ".repeat(100)}${"👩‍👩‍👧‍👦né".repeat(50)}`;
  const script = joinProcess(t, `ana@127.0.0.1:${port}`);
  script.end(`${text}\nlast`);
  assert.equal(await script.ended, 0);
  await bo.wait(/PRIVMSG #chat :last\r\n/);
  const parts = [...bo.all.matchAll(/:ana!ana@chat PRIVMSG #chat :?(.*)\r\n/g)].map(([line, part = ""]) => {
    assert.ok(Buffer.byteLength(line) <= LIMITS.bodyBytes);
    return part;
  });
  assert.equal(parts.slice(0, -1).join("").replaceAll(" ", ""), text.replaceAll(" ", ""));
  assert.ok(parts.every((part) => !/^\u200d|\u200d$|^é/.test(part)));
  assert.ok(parts.slice(0, 5).every((part) => part.endsWith("né")), "the first ones end with a word");
});

test("a script whose server has gone ends with status 1 after --timeout, and lists the lines that were not sent", async (t) => {
  const server = await serveProcess(t);
  const script = joinProcess(t, `bot@127.0.0.1:${server.port}`, ["--timeout", "1"]);
  await script.err.wait(/in #chat as bot/);
  server.child.kill("SIGKILL");
  await script.err.wait(/connection lost: /);
  script.end("first\nsecond\n");
  assert.equal(await script.ended, 1);
  assert.match(
    script.err.all,
    /chat: gave up: the server took nothing for 1 s\nchat: 2 lines were not sent:\nchat: in #chat: first\nchat: in #chat: second\n$/,
  );
});

test("a script whose server never replies ends with status 1 after --timeout", async (t) => {
  const { key, cert } = SELF_SIGNED;
  const mute = await other(t, tls.createServer({ key, cert, minVersion: "TLSv1.3", ALPNProtocols: ["irc"] }));
  const script = joinProcess(t, `bot@127.0.0.1:${mute}`, ["--timeout", "1"]);
  script.end("never\n");
  assert.equal(await script.ended, 1);
  assert.match(script.err.all, /chat: gave up: the server took nothing for 1 s\n/);
});

test("a script that may not join its room ends with status 2 and says why", async (t) => {
  const { port } = await serveHere(t);
  const script = joinProcess(t, `ana@127.0.0.1:${port}`, ["--room", `#${"x".repeat(49)}`]);
  script.end("fine\n");
  assert.equal(await script.ended, 0);
  const member = await enter(t, port, "bo");
  for (let at = 1; at < LIMITS.roomsPerMember; at++) member.send(`JOIN #r${at}`);
  await member.sync();
  const full = joinProcess(t, `bo@127.0.0.1:${port}`, ["--room", "#toomany"]);
  full.end("lost\n");
  assert.equal(await full.ended, 2);
  assert.match(full.err.all, /too many channels/);
});

test("two members keep talking while a hundred others register", async (t) => {
  const server = await serveProcess(t, ["--rate", "0", "--per-address", "500"]);
  const [ana, bo] = [await enter(t, server.port, "ana"), await enter(t, server.port, "bo")];
  const registered = async (nick: string) => {
    const member = await help.dial(t, server.port);
    member.send("PASS secret", `NICK ${nick}`, `USER ${nick} 0 * :${nick}`);
    await member.wait(/ 366 \S+ #chat :End of \/NAMES list\r\n/, 55_000); // passwords are hashed two at a time
  };
  const crowd = Array.from({ length: 100 }, (_, at) => registered(`n${at}`));
  let said = 0; // negative once everybody has registered
  const done = Promise.all(crowd).finally(() => said = -said);
  while (said >= 0) {
    ana.send(`PRIVMSG #chat :number ${++said}.`);
    await bo.wait(new RegExp(`PRIVMSG #chat :number ${said}\\.\r\n`));
    await new Promise(setImmediate);
  }
  await done;
  assert.ok(-said > 100, `only ${-said} lines were said meanwhile`);
});

test("the executable opens no file for writing, and none at all once it serves", wants("strace"), async (t) => {
  const trace = path.join(fs.mkdtempSync(path.join(os.tmpdir(), "chat-trace-")), "trace");
  const strace = [
    "strace",
    "-f",
    "-e",
    "trace=open,openat,openat2,creat,execve,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat",
    "-o",
    trace,
  ];
  const running = new help.Running(t, [...strace, BINARY, "serve", "127.0.0.1:0"]);
  const [, port] = await running.err.wait(/join \S+:(\d+)\//);
  await running.err.wait(/only this machine/);
  const started = fs.readFileSync(trace, "utf8").length;
  const ana = await enter(t, Number(port), "ana");
  ana.send("PRIVMSG #chat :hello");
  await ana.sync();
  execFileSync("pkill", ["-TERM", "-P", String(running.child.pid)]); // the server is a child of strace
  await running.ended;
  const all = fs.readFileSync(trace, "utf8");
  fs.rmSync(path.dirname(trace), { recursive: true });
  const opened = all.split("\n").filter((line) => /open|creat/.test(line) && !/= -1/.test(line));
  assert.ok(opened.length > 0 && /O_RDONLY/.test(all));
  assert.deepEqual(
    opened.filter((line) => /O_WRONLY|O_RDWR|O_CREAT|creat\(/.test(line) && !/"\/dev\/(null|tty)"/.test(line)),
    [],
  );
  assert.doesNotMatch(all, /rename|unlink|mkdir/);
  assert.equal(all.match(/execve\(/g)?.length, 1);
  const later = all.slice(started).split("\n").filter((line) =>
    /open/.test(line) && !/"\/(proc|sys|dev|etc\/(localtime|ssl))|zoneinfo/.test(line)
  );
  assert.deepEqual(later.filter((line) => /openat/.test(line)), []);
});

test("inside the executable no file can be read and no process started, whatever NODE_OPTIONS says", (t) => {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "chat-preload-"));
  t.after(() => fs.rmSync(folder, { recursive: true }));
  const file = path.join(folder, "preload.cjs");
  fs.writeFileSync(file, `process.stdout.write("loosened");`);
  for (const options of [`--require ${file}`, "--allow-fs-read=* --allow-child-process", "--inspect"]) {
    const { status, stdout, stderr } = run(["version"], { NODE_OPTIONS: options });
    assert.deepEqual([status, stdout, stderr], [0, `chat ${VERSION}\n`, ""]);
  }
  // A probe instead of the program, built with the settings of the executable.
  const settings = JSON.parse(fs.readFileSync(path.join(ROOT, "dist", "runtime", "chat.json"), "utf8"));
  const [probe, config, output] = ["probe.cjs", "sea.json", "probe"].map((name) => path.join(folder, name));
  fs.writeFileSync(
    probe ?? "",
    `
    const tries = {
      read: () => require("node:fs").readFileSync("/etc/passwd"),
      write: () => require("node:fs").writeFileSync("${folder}/written", "x"),
      list: () => require("node:fs").readdirSync("/"),
      start: () => require("node:child_process").execSync("true"),
      thread: () => new (require("node:worker_threads").Worker)("1", { eval: true }),
    };
    for (const [name, run] of Object.entries(tries)) {
      try { run(); console.log(name, "worked"); } catch (error) { console.log(name, error.code); }
    }`,
  );
  fs.writeFileSync(config ?? "", JSON.stringify({ ...settings, main: probe, output, useCodeCache: false }));
  execFileSync(process.execPath, ["--build-sea", config ?? ""]);
  const probed = spawnSync(output ?? "", { env: environment({ NODE_OPTIONS: "--allow-fs-read=*" }), encoding: "utf8" });
  const denied = ["read", "write", "list", "start", "thread"].map((name) => `${name} ERR_ACCESS_DENIED\n`).join("");
  assert.deepEqual([probed.stdout, probed.stderr], [denied, ""]);
});

test("an error is printed without a stack trace", async () => {
  const written: string[] = [];
  const write = process.stderr.write;
  process.stderr.write = ((text: string) => written.push(text) > 0) as typeof write;
  try {
    assert.equal(await main(["serve", "--name", "x", "256.256.256.256:1"]), 1);
  } finally {
    process.stderr.write = write;
  }
  assert.doesNotMatch(written.join(""), /\bat .*:\d+:\d+|Error/);
});

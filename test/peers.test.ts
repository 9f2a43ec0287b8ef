// Other people's software: IRC clients on this server, TLS tools, and `join` on other IRC servers.
import assert from "node:assert/strict";
import { execFile, spawn } from "node:child_process";
import crypto from "node:crypto";
import { once } from "node:events";
import fs from "node:fs";
import net from "node:net";
import os from "node:os";
import path from "node:path";
import { test, type TestContext } from "node:test";
import tls from "node:tls";
import { promisify } from "node:util";
import { selfSigned } from "../chat.ts";
import {
  BINARY,
  enter,
  freePort,
  type Irc,
  joinProcess,
  keyHash,
  ROOT,
  Running,
  type Served,
  serveProcess,
  Terminal,
  Text,
  wants,
  which,
} from "./helpers.ts";

function folder(t: TestContext): string {
  const made = fs.mkdtempSync(path.join(os.tmpdir(), "chat-peer-"));
  t.after(() => fs.rmSync(made, { recursive: true, force: true }));
  return made;
}

const CA = path.join(ROOT, "certs", "ca.pem");
const read = (name: string) => fs.readFileSync(path.join(ROOT, "certs", name), "utf8");
/** The certificate of an authority: clients that trust it verify the server. */
const CERTIFIED = { CHAT_KEY: read("server.key"), CHAT_CERT: read("server.pem") };

/** A server with two members in the room: ana with `join` in a terminal, and bo on a connection of the test. */
async function room(
  t: TestContext,
  env: Readonly<Record<string, string>> = CERTIFIED,
): Promise<{ server: Served; ana: Terminal; bo: Irc }> {
  const server = await serveProcess(t, [], { env });
  const bo = await enter(t, server.port, "bo", "away-notify");
  const ana = new Terminal(t, [BINARY, "join", `ana@127.0.0.1:${server.port}`], {
    columns: 100,
    rows: 50,
    env: { CHAT_PASSWORD: "x" },
  });
  await ana.wait(/Welcome/);
  return { server, ana, bo };
}

/**
 * Has an IRC client in a terminal do what its user would, and checks what the others get, and the reverse.
 * @param inLab waits until the client shows #lab
 */
async function converse(
  client: Terminal,
  nick: string,
  { server, ana, bo }: Awaited<ReturnType<typeof room>>,
  inLab: () => Promise<unknown> = () => client.wait(/has joined #lab/),
): Promise<void> {
  await bo.wait(new RegExp(`:${nick}!${nick}@chat JOIN #chat\r\n`));
  await ana.wait(new RegExp(`-- \\d\\d:\\d\\d #chat: ${nick} joined`));
  client.enter("hello from outside");
  await bo.wait(new RegExp(`:${nick}!${nick}@chat PRIVMSG #chat :hello from outside\r\n`));
  await ana.wait(new RegExp(`${nick} +hello from outside`));
  ana.enter("hello from inside");
  await client.wait(/ana.*hello from inside/);
  client.enter("/msg ana psst");
  await ana.wait(new RegExp(`${nick}>ana +psst`));
  ana.enter("/r what is it");
  client.enter("/topic we have a visitor");
  await ana.wait(new RegExp(`-- ${nick} set the topic of #chat: we have a visitor`));
  client.enter("/me waves");
  await ana.wait(new RegExp(`\\* ${nick} waves`));
  client.enter("/join #lab");
  bo.send("JOIN #lab");
  await bo.wait(/ 353 bo = #lab :/);
  await inLab();
  client.enter("in the lab");
  await bo.wait(new RegExp(`:${nick}!${nick}@chat PRIVMSG #lab :in the lab\r\n`));
  client.enter("/away back soon");
  await bo.wait(new RegExp(`:${nick}!${nick}@chat AWAY :back soon\r\n`));
  bo.send(`PRIVMSG ${nick} :there?`);
  await bo.wait(new RegExp(` 301 bo ${nick} :back soon\r\n`));
  client.enter("/part #lab");
  await bo.wait(new RegExp(`:${nick}!${nick}@chat PART #lab`));
  client.enter("/quit that was it");
  await bo.wait(new RegExp(`:${nick}!${nick}@chat QUIT :Quit: that was it\r\n`));
  await ana.wait(new RegExp(`-- \\d\\d:\\d\\d #chat: ${nick} left`));
  assert.doesNotMatch(server.err.all, /error/);
}

/** Has a client that was started again say something. */
async function sayAgain(client: Terminal, nick: string, { ana, bo }: Awaited<ReturnType<typeof room>>): Promise<void> {
  client.enter("back again");
  await bo.wait(new RegExp(`:${nick}!${nick}@chat PRIVMSG #chat :back again\r\n`));
  await ana.wait(new RegExp(`${nick} +back again`));
}

/** irssi takes fast typing for a paste and asks for a confirmation, unless this setting is made. */
const NO_PASTE_CHECK = `"fe-text" = { paste_verify_line_count = "0"; };`;

for (const mechanism of ["PASS", "SASL PLAIN"] as const) {
  test(
    `a user of irssi who logged in by ${mechanism} can talk, change rooms, and use the usual commands`,
    wants("tmux", "irssi"),
    async (t) => {
      const isPinned = mechanism === "PASS"; // by its key; the other time by the authority that has signed it
      const all = await room(t, isPinned ? {} : CERTIFIED);
      const { port } = all.server;
      const verification = isPinned
        ? `tls_verify = "no"; tls_pinned_pubkey = "${await keyHash(port)}";`
        : `tls_verify = "yes"; tls_cafile = "${CA}";`;
      const home = folder(t);
      if (mechanism === "SASL PLAIN") {
        const first = await enter(t, port, "iris");
        first.send("QUIT");
        await first.closed;
      }
      const login = mechanism === "PASS"
        ? ""
        : `sasl_mechanism = "PLAIN"; sasl_username = "iris"; sasl_password = "secret";`;
      fs.writeFileSync(
        path.join(home, "config"),
        `
      servers = ( { address = "localhost"; chatnet = "chat"; port = "${port}"; use_tls = "yes"; ${verification}
        autoconnect = "yes"; ${mechanism === "PASS" ? 'password = "secret";' : ""} } );
      chatnets = { chat = { type = "IRC"; nick = "iris"; cmdmax = "100"; cmdspeed = "0"; ${login} }; };
      settings = { "irc/core" = { cmds_max_at_once = "100"; cmd_queue_speed = "1msec"; };
        "fe-common/core" = { autocreate_own_query = "no"; autocreate_query_level = "NONE"; };
        ${NO_PASTE_CHECK} };`,
      );
      const irssi = new Terminal(t, ["irssi", `--home=${home}`], { columns: 100, rows: 40 });
      await irssi.wait(/Act: .*2|\[#chat\]/);
      irssi.enter("/window 2");
      await irssi.wait(/iris \[iris@chat\] has joined #chat/);
      irssi.enter("/names");
      await irssi.wait(/\[ ana\].*\[ bo\]|\[ bo\].*\[ ana\]/);
      irssi.enter("/whois bo");
      irssi.enter("/who #chat");
      irssi.enter("/list");
      irssi.enter("/window 1");
      await irssi.wait(/bo \[bo@chat\]/);
      await irssi.wait(/is using a secure connection/);
      await irssi.wait(/End of \/WHO list/);
      await irssi.wait(/#chat 3/);
      irssi.enter("/window 2");
      await converse(irssi, "iris", all);
    },
  );
}

test(
  "irssi gets the private messages that were sent while it was disconnected",
  wants("tmux", "irssi"),
  async (t) => {
    const { server, ana, bo } = await room(t);
    const home = folder(t);
    const connect = [
      "irssi",
      `--home=${home}`,
      "-c",
      "127.0.0.1",
      "-p",
      String(server.port),
      "-w",
      "secret",
      "-n",
      "iris",
    ];
    fs.writeFileSync(
      path.join(home, "config"),
      `
    servers = ( { address = "127.0.0.1"; port = "${server.port}"; use_tls = "yes"; tls_verify = "no"; } );
    settings = { server = { server_reconnect_time = "1sec"; server_connect_timeout = "10sec"; };
      ${NO_PASTE_CHECK} };`,
    );
    const irssi = new Terminal(t, connect, { columns: 100 });
    await bo.wait(/:iris!iris@chat JOIN/);
    irssi.enter("/quit");
    await bo.wait(/:iris!iris@chat QUIT/);
    ana.enter("/msg iris while you were out");
    await ana.wait(/-- iris is not here, and will read it on return/);
    const again = new Terminal(t, connect, { columns: 100 });
    await bo.wait(/:iris!iris@chat JOIN/);
    again.enter("/window 3");
    await again.wait(/ana> while you were out/);
  },
);

test("a user of WeeChat can talk, change rooms, and use the usual commands", wants("tmux", "weechat"), async (t) => {
  const all = await room(t);
  const home = folder(t);
  const server = `/server add chat 127.0.0.1/${all.server.port} -tls -nicks=wee -password=secret`;
  const commands = [
    server,
    `/set weechat.network.gnutls_ca_user ${CA}`,
    "/set irc.server.chat.ssl on",
    "/set irc.server.chat.anti_flood_prio_high 0",
    "/set irc.server.chat.anti_flood_prio_low 0",
    "/connect chat",
  ];
  const weechat = new Terminal(t, ["weechat", "-d", home, ...commands.flatMap((one) => ["-r", one])], {
    columns: 110,
    rows: 40,
  });
  await weechat.wait(/#chat/);
  weechat.enter("/buffer #chat");
  await weechat.wait(/wee@chat\) has joined #chat/);
  await weechat.wait(/\bana\b/);
  await converse(weechat, "wee", all);
});

test(
  "a user of catgirl can talk, change rooms, use the usual commands, and come back",
  wants("tmux", "catgirl"),
  async (t) => {
    const all = await room(t);
    const { port } = all.server;
    const command = ["catgirl", "-h", "127.0.0.1", "-p", String(port), "-t", CA, "-n", "cat", "-w", "secret"];
    const catgirl = new Terminal(t, [...command, "-j", "#chat"], { columns: 110, rows: 40 });
    await catgirl.wait(/In #chat are/);
    catgirl.enter("/names");
    await catgirl.wait(/In #chat are .*ana/);
    await converse(catgirl, "cat", all, () => catgirl.wait(/cat arrives in #lab/));
    const again = new Terminal(t, [...command, "-j", "#chat"], { columns: 110, rows: 40 });
    await again.wait(/In #chat are/);
    await sayAgain(again, "cat", all);
  },
);

test(
  "a user of finch, which is made of libpurple, can talk, change rooms, use the usual commands, and come back",
  wants("tmux", "finch"),
  async (t) => {
    const all = await room(t);
    const { port } = all.server;
    const home = folder(t);
    const peers = path.join(home, ".purple", "certificates", "x509", "tls_peers");
    fs.mkdirSync(peers, { recursive: true });
    fs.copyFileSync(path.join(ROOT, "certs", "server.pem"), path.join(peers, "127.0.0.1")); // as "Accept" does
    fs.writeFileSync(
      path.join(home, ".purple", "accounts.xml"),
      `<account version='1.0'><account><protocol>prpl-irc</protocol><name>fin@127.0.0.1</name><password>secret</password>
      <settings><setting name='ssl' type='bool'>1</setting><setting name='port' type='int'>${port}</setting>
      <setting name='ratelimit-interval' type='int'>0</setting></settings>
      <settings ui='gnt-purple'><setting name='auto-login' type='bool'>1</setting></settings></account></account>`,
    );
    /** Brings a room to the front: the last row of the screen lists the windows. */
    const show = async (finch: Terminal, name: string) => {
      const [bar] = await finch.wait(new RegExp(`.*│${name} \\(fin@127.*$`));
      finch.keys(`M-${bar.split("│").findIndex((title) => title.startsWith(name)) + 1}`);
      await finch.wait(new RegExp(`┤${name}[^]*users:`));
    };
    const start = async () => {
      const finch = new Terminal(t, ["finch"], { columns: 110, rows: 40, env: { HOME: home } });
      await show(finch, "#chat");
      return finch;
    };
    const finch = await start();
    await converse(finch, "fin", all, () => show(finch, "#lab"));
    const again = await start();
    await sayAgain(again, "fin", all);
  },
);

/** A robot: it repeats what it is told, and prints the names in a room and the rooms that there are. */
const ROBOT = `
import { createRequire } from "node:module";
const { Client } = createRequire(process.cwd() + "/")("irc-framework");
const [port] = process.argv.slice(2);
const robot = new Client();
robot.on("message", (one) => {
  if (one.type !== "privmsg" || one.nick === robot.user.nick) return;
  if (one.message === "rooms?") robot.list();
  else one.reply("you said: " + one.message);
});
robot.on("registered", () => console.log("registered as", robot.user.nick));
robot.on("userlist", ({ channel, users }) => console.log("names", channel, users.map(({ nick }) => nick).sort().join()));
robot.on("channel list", (rooms) => console.log("rooms", rooms.map(({ channel }) => channel).join()));
robot.on("close", () => { // its own reconnecting waits for seconds
  console.log("reconnecting");
  robot.connect();
});
robot.connect({
  host: "127.0.0.1", port: Number(port), tls: true, rejectUnauthorized: true, nick: "robot", password: "secret",
  account: { account: "robot", password: "secret" },
});
`;

test("a robot made with irc-framework registers, talks, lists, and reconnects, with its server verified", async (t) => {
  const { server: { port }, ana, bo } = await room(t);
  const home = folder(t);
  fs.writeFileSync(path.join(home, "robot.mjs"), ROBOT);
  const install = ["install", "--prefix", home, "--ignore-scripts", "--no-audit", "--no-fund", "irc-framework@4.14.0"];
  await promisify(execFile)("npm", install); // in the environment of the tests, which may say how to reach the registry
  const connections: net.Socket[] = [];
  const proxy = net.createServer((near) => {
    const far = net.connect(port, "127.0.0.1");
    connections.push(near);
    for (const [one, other] of [[near, far], [far, near]] as const) {
      one.pipe(other);
      one.on("error", () => {}).on("close", () => other.destroy());
    }
  }).listen(0, "127.0.0.1");
  t.after(() => {
    proxy.close();
    for (const one of connections) one.destroy();
  });
  await once(proxy, "listening");
  const { port: near } = proxy.address() as net.AddressInfo;
  const trust = { NODE_EXTRA_CA_CERTS: CA };
  const robot = new Running(t, [process.execPath, "robot.mjs", String(near)], trust, { cwd: home });
  for (const round of ["first", "second"]) {
    await robot.out.wait(/registered as robot\n/); // SASL fails the first time, and PASS registers
    await robot.out.wait(/names #chat ana,bo,robot\n/);
    bo.send(`PRIVMSG #chat :${round}`);
    await bo.wait(new RegExp(`:robot!robot@chat PRIVMSG #chat :you said: ${round}\r\n`));
    await ana.wait(new RegExp(`robot +you said: ${round}`));
    bo.send("PRIVMSG robot :in private");
    await bo.wait(/:robot!robot@chat PRIVMSG bo :you said: in private\r\n/);
    bo.send("PRIVMSG robot :rooms?");
    await robot.out.wait(/rooms #chat\n/);
    connections.at(-1)?.destroy();
    await robot.out.wait(/reconnecting\n/);
  }
});

test(
  "a person can log in and talk by typing IRC into openssl s_client and gnutls-cli, with LF line endings",
  wants("openssl", "gnutls-cli"),
  async (t) => {
    const server = await serveProcess(t, [], { env: CERTIFIED });
    const bo = await enter(t, server.port, "bo");
    const at = `127.0.0.1:${server.port}`;
    for (
      const [nick, command] of [["sue", [
        "openssl",
        "s_client",
        "-quiet",
        "-verify_return_error",
        "-CAfile",
        CA,
        "-connect",
        at,
      ]], ["gus", [
        "gnutls-cli",
        "--x509cafile",
        CA,
        "-p",
        String(server.port),
        "127.0.0.1",
      ]]] as const
    ) {
      const tool = new Running(t, command);
      tool.write(`NICK ${nick}\nPASS secret\nUSER ${nick} 0 * :Typed by hand\n`);
      await tool.out.wait(new RegExp(`:${nick}!${nick}@chat JOIN #chat\r?\n`));
      tool.write("PRIVMSG #chat :typed by hand\n");
      await bo.wait(new RegExp(`:${nick}!${nick}@chat PRIVMSG #chat :typed by hand\r\n`));
      bo.send("PRIVMSG #chat :seen");
      await tool.out.wait(/PRIVMSG #chat :seen\r?\n/);
      tool.write("QUIT\n");
      await bo.wait(new RegExp(`:${nick}!${nick}@chat QUIT`));
    }
  },
);

test(
  "connections without TLS 1.3 are refused, and the log says what they sent instead",
  wants("openssl"),
  async (t) => {
    const server = await serveProcess(t);
    const at = `127.0.0.1:${server.port}`;
    await new Running(t, ["openssl", "s_client", "-tls1_2", "-connect", at]).ended;
    await server.err.wait(/no TLS from 127\.0\.0\.1: it does not know TLS 1\.3\n/);
    const plain = net.connect(server.port, "127.0.0.1");
    plain.on("error", () => {});
    plain.end("GET / HTTP/1.1\r\n\r\n");
    await server.err.wait(/no TLS from 127\.0\.0\.1: that was HTTP\n/);
    const garbage = net.connect(server.port, "127.0.0.1");
    garbage.on("error", () => {});
    garbage.end("NICK ana\r\nUSER ana 0 * :ana\r\n");
    await server.err.wait(/no TLS from 127\.0\.0\.1: that was not TLS\n/);
  },
);

// ---- `join` on other IRC servers

function keyAndCertificate(home: string): { key: string; cert: string } {
  const { privateKey } = crypto.generateKeyPairSync("ec", { namedCurve: "P-256" });
  const files = { key: path.join(home, "key.pem"), cert: path.join(home, "cert.pem") };
  fs.writeFileSync(files.key, privateKey.export({ type: "pkcs8", format: "pem" }));
  fs.writeFileSync(files.cert, selfSigned(privateKey));
  fs.chmodSync(home, 0o755);
  fs.chmodSync(files.key, 0o644);
  return files;
}

/** Runs an IRC server until it accepts TLS connections on the port. */
async function ircd(t: TestContext, command: readonly string[], port: number): Promise<void> {
  const [file = "", ...args] = command;
  const child = spawn(which(file) ?? file, args, { stdio: ["ignore", "pipe", "pipe"] });
  const output = new Text();
  child.stdout.on("data", (chunk) => output.add(chunk));
  child.stderr.on("data", (chunk) => output.add(chunk));
  t.after(async () => {
    child.kill("SIGKILL");
    if (child.exitCode === null && child.signalCode === null) await once(child, "close");
  });
  for (;;) {
    const socket = tls.connect({ host: "127.0.0.1", port, rejectUnauthorized: false });
    const up = await new Promise<boolean>((resolve) => {
      socket.on("secureConnect", () => resolve(true));
      socket.on("error", () => resolve(false));
    });
    socket.destroy();
    if (up) return;
    if (child.exitCode !== null) throw new Error(`${file} ended:\n${output.all}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

/** Starts ngircd. */
async function ngircd(t: TestContext): Promise<number> {
  const [home, port] = [folder(t), await freePort()];
  const { key, cert } = keyAndCertificate(home);
  const config = path.join(home, "ngircd.conf");
  fs.writeFileSync(
    config,
    `[Global]
Name = irc.example.net
Info = Test
Listen = 127.0.0.1
Ports =
[Limits]
MaxConnectionsIP = 0
MaxPenaltyTime = 0
[Options]
DNS = no
Ident = no
PAM = no
[SSL]
CertFile = ${cert}
KeyFile = ${key}
Ports = ${port}
`,
  );
  await ircd(t, ["ngircd", "-n", "-f", config], port);
  return port;
}

test("join on ngircd says that it is not a chat server, and ends with status 1", wants("tmux", "ngircd"), async (t) => {
  const port = await ngircd(t);
  const expected =
    `chat: 127.0.0.1:${port} is an IRC server, but not a chat server\nchat: hint: an IRC client such as irssi gets in\n`;
  for (const args of [[], ["--room", "#lab"]]) {
    const script = joinProcess(t, `ana@127.0.0.1:${port}`, args);
    script.end("hello\n");
    assert.equal(await script.ended, 1);
    assert.ok(script.err.all.endsWith(` unchecked: it is this machine\n${expected}`), script.err.all);
    assert.equal(script.out.all, "");
  }
  const ana = new Terminal(t, [BINARY, "join", `ana@127.0.0.1:${port}`], { columns: 120 });
  await ana.wait(/\[exit 1\]/);
  const screen = ana.screen({ history: true });
  assert.ok(screen.endsWith(` unchecked: it is this machine\n${expected}[exit 1]`), screen);
});

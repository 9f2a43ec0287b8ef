// deno-lint-ignore-file no-regex-spaces -- screens are matched as they stand, blanks included
// Software that nobody here wrote: IRC clients in our room, tools that speak TLS, our client on other servers.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import crypto from "node:crypto";
import { once } from "node:events";
import fs from "node:fs";
import net from "node:net";
import os from "node:os";
import path from "node:path";
import { test, type TestContext } from "node:test";
import tls from "node:tls";
import { parse, selfSigned } from "../chat.ts";
import {
  BINARY,
  enter,
  type Irc,
  joinProcess,
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

/** A server with two of our own clients in the room: one in a terminal, one held by hand. */
async function room(t: TestContext): Promise<{ server: Served; ana: Terminal; bo: Irc }> {
  const server = await serveProcess(t);
  const bo = await enter(t, server.port, "bo", "away-notify");
  const ana = new Terminal(t, [BINARY, "join", `ana@127.0.0.1:${server.port}`], {
    columns: 100,
    rows: 50,
    env: { CHAT_PASSWORD: "x" },
  });
  await ana.wait(/Welcome/);
  return { server, ana, bo };
}

/** What a client in a terminal is to do, whichever it is; `command` prefixes what it takes as one. */
async function sits(
  client: Terminal,
  nick: string,
  { server, ana, bo }: Awaited<ReturnType<typeof room>>,
): Promise<void> {
  await bo.wait(new RegExp(`:${nick}!${nick}@chat JOIN #chat\r\n`));
  await ana.wait(new RegExp(`-- ${nick} joined`));
  client.enter("hello from outside");
  await bo.wait(new RegExp(`:${nick}!${nick}@chat PRIVMSG #chat :hello from outside\r\n`));
  await ana.wait(new RegExp(`${nick} +hello from outside`));
  ana.enter("hello from inside");
  await client.wait(/ana.*hello from inside/);
  client.enter("/msg ana psst");
  await ana.wait(new RegExp(`${nick} > ana psst`));
  ana.enter("/r what is it");
  client.enter("/topic we have a visitor");
  await ana.wait(new RegExp(`-- ${nick} set the topic of #chat: we have a visitor`));
  client.enter("/me waves");
  await ana.wait(new RegExp(`\\* ${nick} waves`));
  client.enter("/join #lab");
  bo.send("JOIN #lab");
  await bo.wait(/ 353 bo = #lab :/);
  await client.wait(/has joined #lab/);
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
  await ana.wait(new RegExp(`-- ${nick} left`));
  assert.doesNotMatch(server.err.all, /error/);
}

/** irssi takes fast typing for a paste and asks whether it is meant; a setting tells it not to. */
const TYPED = `"fe-text" = { paste_verify_line_count = "0"; };`;

for (const road of ["PASS", "SASL PLAIN"] as const) {
  test(`irssi sits in the room, by ${road}`, wants("tmux", "irssi"), async (t) => {
    const all = await room(t);
    const { port, pin } = all.server;
    const home = folder(t);
    if (road === "SASL PLAIN") {
      const first = await enter(t, port, "iris");
      first.send("QUIT");
      await first.closed;
    }
    const login = road === "PASS" ? "" : `sasl_mechanism = "PLAIN"; sasl_username = "iris"; sasl_password = "secret";`;
    fs.writeFileSync(
      path.join(home, "config"),
      `
      servers = ( { address = "127.0.0.1"; chatnet = "chat"; port = "${port}"; use_tls = "yes"; tls_verify = "no";
        autoconnect = "yes"; ${road === "PASS" ? 'password = "secret";' : ""} } );
      chatnets = { chat = { type = "IRC"; nick = "iris"; cmdmax = "100"; cmdspeed = "0"; ${login} }; };
      settings = { "irc/core" = { cmds_max_at_once = "100"; cmd_queue_speed = "1msec"; };
        "fe-common/core" = { autocreate_own_query = "no"; autocreate_query_level = "NONE"; };
        ${TYPED} };`,
    );
    assert.ok(pin);
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
    await sits(irssi, "iris", all);
  });
}

test(
  "irssi reads what was said to it while it was away, and comes back by itself",
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
      ${TYPED} };`,
    );
    const irssi = new Terminal(t, connect, { columns: 100 });
    await bo.wait(/:iris!iris@chat JOIN/);
    irssi.enter("/quit");
    await bo.wait(/:iris!iris@chat QUIT/);
    ana.enter("/msg iris while you were out");
    await ana.wait(/-- iris: is not here, and reads it on return/);
    const again = new Terminal(t, connect, { columns: 100 });
    await bo.wait(/:iris!iris@chat JOIN/);
    again.enter("/window 3");
    await again.wait(/ana> while you were out/);
  },
);

test("WeeChat sits in the room", wants("tmux", "weechat"), async (t) => {
  const all = await room(t);
  const home = folder(t);
  const server = `/server add chat 127.0.0.1/${all.server.port} -tls -nicks=wee -password=secret`;
  const commands = [
    server,
    "/set irc.server.chat.tls_verify off",
    "/set irc.server.chat.ssl_verify off",
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
  await sits(weechat, "wee", all);
});

test(
  "what one types into openssl s_client and gnutls-cli is a conversation",
  wants("openssl", "gnutls-cli"),
  async (t) => {
    const server = await serveProcess(t);
    const bo = await enter(t, server.port, "bo");
    const at = `127.0.0.1:${server.port}`;
    for (
      const [nick, command] of [["sue", ["openssl", "s_client", "-quiet", "-connect", at]], ["gus", [
        "gnutls-cli",
        "--insecure",
        "--no-ca-verification",
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

test("nothing older than TLS 1.3 is taken, and the log says what came instead", wants("openssl"), async (t) => {
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
});

// ---- Our client elsewhere

/** A free port; the program that takes it is started at once. */
async function freePort(): Promise<number> {
  const server = net.createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address() as net.AddressInfo;
  server.close();
  await once(server, "close");
  return port;
}

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
  const told = new Text();
  child.stdout.on("data", (chunk) => told.add(chunk));
  child.stderr.on("data", (chunk) => told.add(chunk));
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
    if (child.exitCode !== null) throw new Error(`${file} ended:\n${told.all}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

const SERVERS: Readonly<Record<string, (t: TestContext) => Promise<number>>> = {
  async ngircd(t) {
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
  },
  async inspircd(t) {
    const [home, port] = [folder(t), await freePort()];
    const { key, cert } = keyAndCertificate(home);
    const config = path.join(home, "inspircd.conf");
    const modules = [
      "ssl_gnutls",
      "cap",
      "ircv3",
      "ircv3_servertime",
      "ircv3_echomessage",
      "ircv3_batch",
      "ircv3_msgid",
      "ircv3_ctctags",
      "md5",
    ];
    fs.writeFileSync(
      config,
      `<server name="irc.example.net" description="Test" network="Test">
<admin name="x" nick="x" email="x@example.net">
<path datadir="${home}" logdir="${home}" runtimedir="${home}">
${modules.map((name) => `<module name="${name}">`).join("\n")}
<sslprofile name="gnutls" provider="gnutls" certfile="${cert}" keyfile="${key}" hash="sha256">
<bind address="127.0.0.1" port="${port}" type="clients" sslprofile="gnutls">
<connect allow="*" timeout="10" flood="0" threshold="1000" commandrate="100000" fakelag="off" localmax="100" globalmax="100" recvq="65536">
<performance somaxconn="128"><dns timeout="1"><options prefixquit="Quit: ">
<log method="file" type="*" level="debug" target="${home}/log">
`,
    );
    await ircd(t, ["inspircd", "--nofork", "--runasroot", `--config=${config}`], port);
    return port;
  },
};

for (const [name, start] of Object.entries(SERVERS)) {
  test(`join is at home on ${name}: in a terminal and as a script`, wants("tmux", name), async (t) => {
    const port = await start(t);
    const reader = joinProcess(t, `bo@127.0.0.1:${port}`, ["--room", "#lab"], { password: "" });
    await reader.err.wait(/in #lab as bo/);
    const ana = new Terminal(t, [BINARY, "join", `ana@127.0.0.1:${port}`, "--room", "lab"], { columns: 100, rows: 40 });
    await ana.wait(/Welcome to #lab, ana\. Here: bo/);
    ana.enter("hello over there");
    await reader.out.wait(/^\S+Z\tana\thello over there\n/);
    await ana.wait(/^\d\d:\d\d ana   hello over there$/m);
    assert.equal(ana.screen().split("hello over there").length, 2, "it is shown once");
    const script = joinProcess(t, `cy@127.0.0.1:${port}`, ["--room", "#lab"], { password: "" });
    script.end(`one\ntwo\n${"long ".repeat(200)}end\n`);
    assert.equal(await script.ended, 0, script.err.all);
    await ana.wait(/^\d\d:\d\d cy    one\n\d\d:\d\d cy    two\n/m);
    await ana.wait(/long end$/m);
    ana.enter("/msg bo psst");
    await reader.out.wait(/^\S+Z\tana\tpsst\n/m);
    ana.enter("/topic set from here");
    await ana.wait(/-- (ana set the topic of #lab: set from here|#lab: you must be a channel op)/);
    ana.enter("/who");
    await ana.wait(/-- 2 people in #lab: /);
    ana.enter("/history");
    await ana.wait(/-- this server keeps no history/);
    ana.enter("/password");
    await ana.wait(/-- this server has no way to do that/);
    ana.enter("/join #other");
    await ana.wait(/-- in #other as ana/);
    ana.enter("/rooms");
    await ana.wait(/-- #lab: 2 in it/);
    ana.enter("/exit");
    await ana.wait(/\[exit 0\]/);
    const taken = joinProcess(t, `bo@127.0.0.1:${port}`, [], { password: "" });
    assert.equal(await taken.ended, 1);
    assert.match(taken.err.all, /chat: nick.* in use/i);
  });
}

/** The least of a server with SASL PLAIN, which none of Debian's has without services. */
async function saslServer(t: TestContext): Promise<{ port: number; said: Text }> {
  const home = folder(t);
  const { key, cert } = keyAndCertificate(home);
  const said = new Text();
  const server = tls.createServer({ key: fs.readFileSync(key), cert: fs.readFileSync(cert) }, (socket) => {
    let nick = "*";
    const answers: Record<string, (params: readonly string[]) => string> = {
      CAP: ([verb, list]) =>
        verb === "LS"
          ? ":s CAP * LS :sasl=EXTERNAL,PLAIN"
          : verb === "REQ"
          ? `:s CAP * ACK :${list}`
          : `:s 001 ${nick} :hi\r\n:s 422 ${nick} :no MOTD`,
      AUTHENTICATE: ([text = ""]) =>
        text === "PLAIN"
          ? "AUTHENTICATE +"
          : `:s ${Buffer.from(text, "base64").toString().endsWith("\0right") ? 903 : 904} ${nick} :done`,
      NICK: ([wish = ""]) => (nick = wish, ""),
      JOIN: ([room = ""]) =>
        `:${nick}!u@h JOIN ${room}\r\n:s 353 ${nick} = ${room} :@${nick}\r\n:s 366 ${nick} ${room} :end`,
      PING: ([token]) => `:s PONG s :${token}`,
      QUIT: () => "ERROR :bye",
    };
    socket.on("error", () => {});
    socket.on("data", (chunk) => {
      said.add(chunk);
      for (const text of chunk.toString().split("\r\n").filter(Boolean)) {
        const { command, params } = parse(text);
        const answer = answers[command]?.(params);
        if (answer) socket.write(`${answer}\r\n`);
      }
    });
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  t.after(() => server.close());
  return { port: (server.address() as net.AddressInfo).port, said };
}

test("SASL PLAIN tells a password only to a server that somebody vouches for", wants("tmux"), async (t) => {
  const { port, said } = await saslServer(t);
  const refused = joinProcess(t, `ana@127.0.0.1:${port}`, [], { password: "right" });
  refused.end("x\n");
  assert.equal(await refused.ended, 3);
  assert.match(refused.err.all, /a password is told only to a server that somebody vouches for/);
  const [, pin] = /took its key (\S+)/.exec(refused.err.all) ?? [];
  assert.doesNotMatch(said.all, /AUTHENTICATE/);
  const pinned = joinProcess(t, `ana@127.0.0.1:${port}/${pin}`, [], { password: "right" });
  pinned.end("hello\n");
  assert.equal(await pinned.ended, 0, pinned.err.all);
  assert.match(said.all, /PRIVMSG #chat :hello/);
  const wrong = joinProcess(t, `ana@127.0.0.1:${port}/${pin}`, [], { password: "wrong" });
  wrong.end();
  assert.equal(await wrong.ended, 1);
  assert.match(wrong.err.all, /wrong password/);
  const ana = new Terminal(t, [BINARY, "join", `ana@127.0.0.1:${port}`], { columns: 120 });
  await ana.wait(/Password \(empty for none\):$/);
  ana.enter("right");
  await ana.wait(/Nobody vouches for this server, and it is told the password\. Go on\? \(yes\/no\)$/);
  ana.enter("yes");
  await ana.wait(/Welcome to #chat/);
});

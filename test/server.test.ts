// The protocol as a client sees it, most of it over TLS.
import assert from "node:assert/strict";
import crypto from "node:crypto";
import { createHash } from "node:crypto";
import { test, type TestContext } from "node:test";
import * as chat from "../chat.ts";
import { dial, enter, FakeClock, type Irc, quickScrypt, serveHere, until } from "./helpers.ts";

quickScrypt();

const ALL =
  "message-tags server-time account-tag extended-join echo-message batch labeled-response away-notify standard-replies " +
  "cap-notify sasl draft/chathistory draft/account-registration account-notify multi-prefix";
const b64 = (text: string) => Buffer.from(text).toString("base64");
const plain = (nick: string, password: string) => b64(`\0${nick}\0${password}`);
/** The lines of a text that match a pattern. */
const lines = (text: string, pattern: RegExp) => text.split("\r\n").filter((line) => pattern.test(line));

// ---- Registration

test("PASS registers a free nick with a notice, and the next time logs in to it", async (t) => {
  const { port } = await serveHere(t);
  const first = await dial(t, port);
  first.send("NICK ana", "PASS secret", "USER ana 0 * :Ana");
  await first.wait(/:chat\.server NOTICE ana :ana is registered now/);
  await first.wait(/:chat\.server 001 ana :.*ana!ana@chat\r\n/);
  await first.wait(/ 376 ana :End of MOTD\r\n:ana!ana@chat JOIN #chat\r\n/);
  await first.wait(/ 353 ana = #chat :ana\r\n/);
  first.send("QUIT");
  await first.wait(/ERROR :Quit\r\n/);
  await first.closed;
  const again = await dial(t, port);
  again.send("PASS secret", "NICK ANA", "USER x 0 * :x");
  await again.wait(/ 001 ana /);
  assert.doesNotMatch(again.all, /registered now/);
});

test("a wrong password is refused with 464, never 433, and the third one closes the connection", async (t) => {
  const { port } = await serveHere(t);
  await enter(t, port, "ana");
  const irc = await dial(t, port);
  irc.send("NICK ana", "USER a 0 * :a", "PASS wrong");
  await irc.wait(/ 464 ana :Wrong password\r\n/);
  irc.send("PASS worse");
  await irc.wait(/ 464 /);
  irc.send("PASS worst");
  await irc.wait(/ 464 [\s\S]*ERROR :Too many wrong passwords\r\n/);
  await irc.closed;
  assert.doesNotMatch(irc.all, / 433 /);
});

test("a password with spaces but no colon is refused with an explanation, and registers nothing", async (t) => {
  const { port, server } = await serveHere(t);
  const irc = await dial(t, port);
  irc.send("PASS correct horse battery staple", "NICK ana", "USER a 0 * :a");
  await irc.wait(/ 464 \* :A password with spaces needs a colon before it/);
  await irc.wait(/NOTICE ana :Set a server password/);
  irc.send("REGISTER * * correct horse battery staple");
  await irc.wait(/FAIL REGISTER UNACCEPTABLE_PASSWORD \* :A password with spaces needs a colon/);
  assert.equal(server.accounts.find("ana"), undefined);
  irc.send("PASS :correct horse battery staple");
  await irc.wait(/NOTICE ana :ana is registered now/);
  await enter(t, port, "ana", "", "correct horse battery staple");
});

test("a client that sends no password is asked for one, and can still send PASS then", async (t) => {
  const { port } = await serveHere(t);
  const irc = await dial(t, port);
  irc.send("JOIN :", "NICK ana", "USER a 0 * :a");
  await irc.wait(/ 451 \* /);
  await irc.wait(/ 464 ana :A password is needed/);
  await irc.wait(/NOTICE ana :.*PASS/);
  irc.send("PASS secret");
  await irc.wait(/ 001 ana /);
});

test("before login every other command is refused with 451, and the connection stays open", async (t) => {
  const { port } = await serveHere(t);
  const irc = await dial(t, port);
  const early = ["CAP", "AUTHENTICATE", "REGISTER", "PASS", "NICK", "USER", "PING", "PONG", "ERROR", "QUIT"];
  for (const name of [...Object.keys(chat.COMMANDS), "NONSENSE"].filter((command) => !early.includes(command))) {
    irc.send(`${name} a b c d`);
    await irc.wait(/ 451 \* :You have not registered\r\n/);
  }
  await irc.sync();
});

const [NICK, USER, END] = ["NICK ana", "USER a 0 * :a", "CAP END"];
for (const order of [[END, NICK, USER], [NICK, END, USER], [USER, NICK, END]]) {
  test(`SASL PLAIN logs in, whereupon ${order.join(", ")} leads to the welcome`, async (t) => {
    const { port } = await serveHere(t);
    (await enter(t, port, "ana")).send("QUIT");
    const irc = await dial(t, port);
    irc.send("CAP LS 302", "CAP REQ :sasl");
    await irc.wait(/CAP \* LS :.*sasl=SCRAM-SCRYPT-PLUS,PLAIN/);
    await irc.wait(/CAP \* ACK sasl\r\n/);
    irc.send("AUTHENTICATE PLAIN");
    await irc.wait(/^AUTHENTICATE \+\r\n/m);
    irc.send(`AUTHENTICATE ${plain("ana", "secret")}`);
    await irc.wait(/ 900 ana ana!ana@chat ana :You are now logged in as ana\r\n.* 903 /);
    assert.doesNotMatch(irc.all, / 001 /);
    irc.send(...order);
    await irc.wait(/ 001 ana /);
  });
}

test("after SASL the nick is that of the account, whatever NICK asked for", async (t) => {
  const { port } = await serveHere(t);
  (await enter(t, port, "ana")).send("QUIT");
  const irc = await dial(t, port);
  irc.send(
    "CAP REQ sasl",
    "NICK ana_",
    "USER a 0 * :a",
    "AUTHENTICATE PLAIN",
    `AUTHENTICATE ${plain("ana", "secret")}`,
    "CAP END",
  );
  await irc.wait(/ 001 ana /);
});

test("SASL can be aborted and tried again, takes chunks of 400 bytes, and lists its mechanisms", async (t) => {
  const { port } = await serveHere(t);
  const long = "p".repeat(288); // makes a SASL message of exactly 400 characters of base64
  (await enter(t, port, "ana", "", long)).send("QUIT");
  const irc = await dial(t, port);
  irc.send("CAP REQ sasl", "AUTHENTICATE NONSENSE");
  await irc.wait(/ 908 \* SCRAM-SCRYPT-PLUS,PLAIN :.*\r\n.* 904 /);
  irc.send("AUTHENTICATE PLAIN", "AUTHENTICATE *");
  await irc.wait(/AUTHENTICATE \+\r\n.* 906 /);
  irc.send("AUTHENTICATE PLAIN", `AUTHENTICATE ${plain("ana", "wrong")}`);
  await irc.wait(/ 904 \* :.*Wrong password/);
  irc.send("AUTHENTICATE PLAIN", `AUTHENTICATE ${"A".repeat(401)}`);
  await irc.wait(/ 905 /);
  irc.send("AUTHENTICATE PLAIN", `AUTHENTICATE ${plain("nobody", "x")}`);
  await irc.wait(/ 904 \* :.*No account of that name/);
  const message = b64(`ana\0ana\0${"p".repeat(288)}`);
  const chunks = [...message.match(/.{1,400}/g) ?? []];
  irc.send(
    "AUTHENTICATE PLAIN",
    ...chunks.map((chunk) => `AUTHENTICATE ${chunk}`),
    ...message.length % 400 ? [] : ["AUTHENTICATE +"],
  );
  await irc.wait(/ 903 /);
  irc.send("CAP END", "NICK x", "USER a 0 * :a");
  await irc.wait(/ 001 ana /);
  irc.send("AUTHENTICATE PLAIN");
  await irc.wait(/ 907 ana :You are logged in already\r\n/);
});

test("PASS registers a free nick also after SASL has failed because there is no such account", async (t) => {
  const { port } = await serveHere(t);
  const irc = await dial(t, port);
  irc.send(
    "CAP REQ sasl",
    "PASS secret",
    "NICK ana",
    "USER a 0 * :a",
    "AUTHENTICATE PLAIN",
    `AUTHENTICATE ${plain("ana", "secret")}`,
  );
  await irc.wait(/ 904 /);
  irc.send("CAP END");
  await irc.wait(/NOTICE ana :ana is registered now/);
  await irc.wait(/ 001 ana /);
});

test("an empty real name is refused, and another one is accepted after it", async (t) => {
  const { port } = await serveHere(t);
  const irc = await dial(t, port);
  irc.send("PASS secret", "NICK ana", "USER a 0 * :", "USER a 0 * : ", "USER a 0 * :Ana");
  await irc.wait(/ 461 ana USER :.*\r\n.* 461 ana USER :/);
  await irc.wait(/ 001 ana /);
});

test("REGISTER makes an account before the welcome and logs in to it", async (t) => {
  const { port } = await serveHere(t);
  const irc = await dial(t, port);
  irc.send("CAP LS 302");
  await irc.wait(/draft\/account-registration=before-connect/);
  irc.send("REGISTER * * secret");
  await irc.wait(/FAIL REGISTER NEED_NICK \* :/);
  irc.send("NICK ana", "USER a 0 * :a", "REGISTER bo * secret");
  await irc.wait(/FAIL REGISTER ACCOUNT_NAME_MUST_BE_NICK bo :/);
  irc.send("REGISTER * me@example.org secret");
  await irc.wait(/FAIL REGISTER UNACCEPTABLE_EMAIL \* :/);
  irc.send("REGISTER * * :");
  await irc.wait(/FAIL REGISTER UNACCEPTABLE_PASSWORD \* :/);
  irc.send("REGISTER * * SCRAM-SCRYPT$1024:AAAA$BBBB:CCCC");
  await irc.wait(/FAIL REGISTER UNACCEPTABLE_PASSWORD \* :/);
  irc.send("REGISTER ANA * secret");
  await irc.wait(/REGISTER SUCCESS ana :/);
  await irc.wait(/ 900 /);
  irc.send("CAP END");
  await irc.wait(/ 001 ana /);
  irc.send("REGISTER * * secret");
  await irc.wait(/FAIL REGISTER ALREADY_AUTHENTICATED \* :/);
  const other = await dial(t, port);
  other.send("CAP LS 302", "NICK ana", "REGISTER * * other");
  await other.wait(/FAIL REGISTER ACCOUNT_EXISTS \* :/);
});

/** Logs in by SCRAM as `join` does. @returns the final numeric, or the error of SCRAM */
async function scram(irc: Irc, nick: string, password: string, binding = bindingOf(irc)): Promise<string> {
  const client = chat.scramClient(nick, (salt) => chat.deriveKeys(password, salt), binding);
  irc.send("AUTHENTICATE SCRAM-SCRYPT-PLUS");
  await irc.wait(/AUTHENTICATE \+\r\n/);
  let message = String((await client.next()).value);
  for (;;) {
    irc.send(`AUTHENTICATE ${b64(message)}`);
    const [, chunk] = await irc.wait(/AUTHENTICATE (\S+)\r\n| 904 .*\r\n/);
    if (!chunk) return "904";
    const answer = Buffer.from(chunk, "base64").toString();
    if (answer.startsWith("e=")) {
      await irc.wait(/ 904 /);
      return answer;
    }
    const step = await client.next(answer);
    if (step.done) {
      assert.equal(step.value, true);
      irc.send("AUTHENTICATE +");
      await irc.wait(/ 903 /);
      return "903";
    }
    message = String(step.value);
  }
}
const bindingOf = (irc: Irc) => createHash("sha256").update(irc.socket.getPeerX509Certificate()?.raw ?? "").digest();

test("REGISTER with a verifier does not log in; SCRAM and PASS then do", async (t) => {
  const { port } = await serveHere(t);
  const irc = await dial(t, port);
  const verifier = chat.formatVerifier(chat.verifierOf(await chat.deriveKeys("secret")));
  irc.send("CAP REQ sasl", "NICK ana", "USER a 0 * :a");
  assert.equal(await scram(irc, "ana", "secret"), "e=unknown-user");
  irc.send(`REGISTER * * ${verifier}`);
  await irc.wait(/REGISTER SUCCESS ana :/);
  assert.doesNotMatch(irc.all, / 900 /);
  assert.equal(await scram(irc, "ana", "wrong"), "e=invalid-proof");
  assert.equal(await scram(irc, "ana", "secret", Buffer.alloc(32)), "e=channel-bindings-dont-match");
  assert.equal(await scram(irc, "ana", "secret"), "903");
  irc.send("CAP END");
  await irc.wait(/ 001 ana /);
  await enter(t, port, "ana", "", "secret");
});

test("PASS with a verifier changes the password of a member who logged in by SCRAM, and of no other", async (t) => {
  const { port } = await serveHere(t);
  const byPass = await enter(t, port, "ana");
  const verifier = chat.formatVerifier(chat.verifierOf(await chat.deriveKeys("new")));
  byPass.send(`PASS ${verifier}`);
  await byPass.wait(/ 462 /);
  const irc = await dial(t, port);
  irc.send("CAP REQ sasl", "NICK ana", "USER a 0 * :a");
  await scram(irc, "ana", "secret");
  irc.send("CAP END");
  await irc.wait(/ 366 /);
  irc.send("PASS plain");
  await irc.wait(/ 462 /);
  irc.send("PASS SCRAM-SCRYPT$1024:AAAA$BBBB:CCCC");
  await irc.wait(/FAIL PASS UNACCEPTABLE_PASSWORD :/);
  irc.send(`PASS ${verifier}`);
  await irc.wait(/NOTE PASS PASSWORD_CHANGED :/);
  await enter(t, port, "ana", "", "new");
  const old = await dial(t, port);
  old.send("PASS secret", "NICK ana", "USER a 0 * :a");
  await old.wait(/ 464 /);
});

test("CAP lists, adds and removes capabilities, and rejects a whole request that names an unknown one", async (t) => {
  const { port } = await serveHere(t);
  const irc = await dial(t, port);
  irc.send("CAP LS");
  const [, names = ""] = await irc.wait(/CAP \* LS :(.*)\r\n/);
  assert.deepEqual(names.split(" ").sort(), ALL.split(" ").sort());
  irc.send("CAP REQ :batch nonsense");
  await irc.wait(/CAP \* NAK :batch nonsense\r\n/);
  irc.send("CAP LIST");
  await irc.wait(/CAP \* LIST :\r\n/);
  irc.send("CAP REQ :batch echo-message");
  await irc.wait(/CAP \* ACK :batch echo-message\r\n/);
  irc.send("CAP REQ :-batch server-time");
  await irc.wait(/CAP \* ACK :-batch server-time\r\n/);
  irc.send("CAP LIST");
  await irc.wait(/CAP \* LIST :server-time echo-message\r\n/);
  irc.send("CAP WHAT");
  await irc.wait(/ 410 \* WHAT :/);
  irc.send("CAP LS 302");
  await irc.wait(/sasl=SCRAM-SCRYPT-PLUS,PLAIN.*cap-notify|cap-notify.*sasl=SCRAM-SCRYPT-PLUS,PLAIN/);
});

test("a client that negotiates capabilities is not welcomed before CAP END", async (t) => {
  const { port } = await serveHere(t);
  const irc = await dial(t, port);
  irc.send("CAP LS 302", "PASS secret", "NICK ana", "USER a 0 * :a");
  assert.doesNotMatch(await irc.sync(), / 001 /);
  irc.send("CAP END");
  await irc.wait(/ 001 /);
});

// ---- Rooms

/** A server with two members in its first room: ana and bo. */
async function two(
  t: TestContext,
  options: chat.ServerOptions = {},
  caps = "",
): Promise<{ port: number; ana: Irc; bo: Irc; server: chat.Server }> {
  const { port, server } = await serveHere(t, options);
  const ana = await enter(t, port, "ana", caps);
  const bo = await enter(t, port, "bo", caps);
  await ana.wait(/:bo!bo@chat JOIN #chat/);
  await Promise.all([ana.sync(), bo.sync()]);
  return { port, ana, bo, server };
}

test("messages reach the other members in the order in which they were sent, and not the sender", async (t) => {
  const { ana, bo } = await two(t);
  for (let at = 0; at < 25; at++) ana.send(`PRIVMSG #chat :line ${at}`);
  for (let at = 25; at < 50; at++) ana.socket.write(`PRIVMSG #chat :line ${at}\n`);
  for (let at = 0; at < 50; at++) await bo.wait(new RegExp(`^:ana!ana@chat PRIVMSG #chat :line ${at}\r\n`, "m"));
  assert.doesNotMatch(await ana.sync(), /PRIVMSG/);
});

test("each connection gets an event in the form of its own capabilities", async (t) => {
  const { port, bo } = await two(t);
  const modern = await enter(t, port, "cy", "message-tags server-time account-tag extended-join");
  await bo.wait(/^:cy!cy@chat JOIN #chat\r\n/m);
  bo.send("PRIVMSG #chat :hi");
  await modern.wait(
    /^@time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z;msgid=\d+-\d+;account=bo :bo!bo@chat PRIVMSG #chat :hi\r\n/m,
  );
  await enter(t, port, "dee");
  await modern.wait(/^@\S+ :dee!dee@chat JOIN #chat dee :dee X\r\n/m);
});

test("JOIN and PART take several rooms, topic and names follow a JOIN, and a second JOIN does nothing", async (t) => {
  const { ana, bo } = await two(t);
  ana.send("JOIN #one,#two");
  await ana.wait(
    /:ana!ana@chat JOIN #one\r\n.* 353 ana = #one :ana\r\n.* 366 ana #one .*\r\n:ana!ana@chat JOIN #two\r\n/,
  );
  await ana.sync();
  ana.send("JOIN #ONE");
  assert.match(await ana.sync(), /^:chat\.server PONG [^\n]*\n$/);
  ana.send("TOPIC #one :what it is about");
  await ana.wait(/:ana!ana@chat TOPIC #one :what it is about\r\n/);
  bo.send("JOIN #one");
  await bo.wait(
    /:bo!bo@chat JOIN #one\r\n.* 332 bo #one :what it is about\r\n.* 333 bo #one ana \d+\r\n.* 353 bo = #one :ana bo\r\n/,
  );
  await ana.wait(/:bo!bo@chat JOIN #one\r\n/);
  ana.send("PART #one,#two :so long");
  await bo.wait(/:ana!ana@chat PART #one :so long\r\n/);
  await ana.wait(/:ana!ana@chat PART #two :so long\r\n/);
  ana.send("PART #one", "PART #nowhere", "JOIN 0", "JOIN nonsense", "JOIN :#a b");
  const answers = await ana.sync();
  assert.match(answers, / 442 ana #one /);
  assert.match(answers, / 403 ana #nowhere /);
  assert.match(answers, /:ana!ana@chat PART #chat\r\n/);
  assert.match(answers, / 476 ana nonsense /);
});

test("JOIN, NAMES, LIST and PART take as many rooms as fit into a line", async (t) => {
  const { ana } = await two(t);
  const rooms = Array.from({ length: 19 }, (_, at) => `#r${at}`); // with the first room, LIMITS.roomsPerMember
  ana.send(`JOIN ${rooms.join(",")}`);
  const joins = await ana.sync();
  assert.equal(lines(joins, /:ana!ana@chat JOIN #r\d/).length, rooms.length);
  ana.send(`NAMES ${rooms.join(",")}`, `LIST ${rooms.join(",")}`, `PART ${rooms.join(",")}`);
  const answers = await ana.sync();
  assert.equal(lines(answers, / 353 ana = #r\d+ :ana$/).length, rooms.length);
  assert.equal(lines(answers, / 322 ana #r\d+ 1 :/).length, rooms.length);
  assert.equal(lines(answers, /:ana!ana@chat PART #r\d/).length, rooms.length);
});

test("every member of a room can read, set and remove its topic", async (t) => {
  const { ana, bo } = await two(t, { topic: "welcome" });
  ana.send("TOPIC #chat");
  await ana.wait(/ 332 ana #chat :welcome\r\n.* 333 ana #chat chat\.server \d+\r\n/);
  bo.send("TOPIC #chat :");
  await ana.wait(/:bo!bo@chat TOPIC #chat :\r\n/);
  ana.send("TOPIC #chat", "TOPIC #other");
  await ana.wait(/ 331 ana #chat :No topic is set\r\n.* 403 ana #other /);
});

test("a message that cannot be delivered is answered with the numeric of Modern IRC, a NOTICE never", async (t) => {
  const { port, ana } = await two(t);
  const cy = await enter(t, port, "cy");
  cy.send("JOIN #private");
  await cy.wait(/ 366 cy #private/);
  ana.send(
    "PRIVMSG",
    "PRIVMSG #chat",
    "PRIVMSG #chat :",
    "PRIVMSG nobody :x",
    "PRIVMSG #nowhere :x",
    "PRIVMSG #private :x",
  );
  await ana.wait(
    / 461 ana PRIVMSG :.*\r\n.* 412 ana .*\r\n.* 412 ana .*\r\n.* 401 ana nobody .*\r\n.* 403 ana #nowhere .*\r\n.* 404 ana #private /,
  );
  await ana.sync();
  ana.send("NOTICE nobody :x", "NOTICE #nowhere :x", "NOTICE #private :x", "NOTICE #chat");
  assert.match(await ana.sync(), /^:chat\.server PONG [^\n]*\n$/);
  ana.send("NOPE");
  await ana.wait(/ 421 ana NOPE :Unknown command/);
});

test("a message goes to four targets at most, and each further one is refused with 407", async (t) => {
  const { port, ana, bo } = await two(t);
  const cy = await enter(t, port, "cy");
  ana.send("PRIVMSG bo,cy,#chat :all of you");
  await bo.wait(/PRIVMSG bo :all of you\r\n/);
  await cy.wait(/PRIVMSG cy :all of you\r\n/);
  await cy.wait(/PRIVMSG #chat :all of you\r\n/);
  const many = Array.from({ length: 20 }, (_, at) => `nobody${at}`);
  ana.send(`PRIVMSG ${many.join(",")} :again`);
  const answers = await ana.sync();
  assert.deepEqual(lines(answers, / 401 ana nobody/).length, chat.LIMITS.targets);
  const refused = [...answers.matchAll(/ 407 ana (\S+) :Too many targets/g)].map(([, target]) => target);
  assert.deepEqual(refused, many.slice(chat.LIMITS.targets));
  for (const command of ["NOTICE", "@+typing=active TAGMSG"]) {
    ana.send(`${command} ana,bo,cy,#chat,one,two :again`);
    assert.equal(lines(await ana.sync(), / 407 ana (one|two) /).length, 2, command);
  }
  ana.send("PRIVMSG bo,BO,bo :once");
  await ana.sync();
  await bo.sync();
  assert.equal(lines(bo.all, /PRIVMSG bo :once/).length, 1);
});

test("a message to oneself is delivered, and also echoed to a client with echo-message", async (t) => {
  const { ana } = await two(t);
  ana.send("PRIVMSG ana :note");
  await ana.wait(/^:ana!ana@chat PRIVMSG ana :note\r\n/m);
  const { port } = await serveHere(t);
  const modern = await enter(t, port, "ana", "echo-message labeled-response batch message-tags");
  modern.send("@label=x PRIVMSG ana :note");
  const seen = await modern.sync();
  assert.equal(lines(seen, /PRIVMSG ana :note/).length, 2, seen);
  assert.equal(lines(seen, /label=x/).length, 1, seen);
  assert.match(seen, /@label=x\S* :ana!ana@chat PRIVMSG/);
});

test("NAMES, LIST and WHO list the rooms and their members", async (t) => {
  const { ana, bo } = await two(t);
  bo.send("JOIN #other", "TOPIC #other :a topic", "AWAY :lunch");
  await bo.wait(/ 306 bo /);
  ana.send("NAMES #chat", "NAMES #other", "NAMES #none", "NAMES");
  await ana.wait(
    / 353 ana = #chat :ana bo\r\n.* 366 ana #chat .*\r\n.* 353 ana = #other :bo\r\n.* 366 ana #other .*\r\n.* 366 ana #none .*\r\n.* 353 ana = #chat :ana bo\r\n.* 366 ana #chat .*\r\n.* 366 ana \* /,
  );
  ana.send("LIST", "LIST #other");
  await ana.wait(
    / 321 ana .*\r\n.* 322 ana #chat 2 :\r\n.* 322 ana #other 1 :a topic\r\n.* 323 ana .*\r\n.* 321 ana .*\r\n.* 322 ana #other 1 :a topic\r\n.* 323 /,
  );
  ana.send("WHO #chat", "WHO bo", "WHO nobody");
  await ana.wait(
    / 352 ana #chat ana chat chat\.server ana H :0 ana X\r\n.* 352 ana #chat bo chat chat\.server bo G :0 bo X\r\n.* 315 ana #chat /,
  );
  await ana.wait(/ 352 ana \* bo .*\r\n.* 315 ana bo .*\r\n.* 315 ana nobody /);
});

test("WHO matches nick, user@host and nick!user@host with a mask, in time that no mask can make long", async (t) => {
  const { ana, port } = await two(t);
  await enter(t, port, "Bob");
  const found = async (mask: string) => {
    ana.send(`WHO ${mask}`);
    return lines(await ana.sync(), / 352 /).map((line) => line.split(" ")[7]).join();
  };
  for (
    const [mask, nicks] of [
      ["*", "ana,bo,Bob"],
      ["0", "ana,bo,Bob"],
      ["b*", "bo,Bob"],
      ["BO?", "Bob"],
      ["bo", "bo"],
      ["*b", "Bob"],
      ["*o*", "bo,Bob"],
      ["?", ""],
      ["??*", "ana,bo,Bob"],
      ["bo@chat", "bo"],
      ["*@chat", "ana,bo,Bob"],
      ["*!b*@*", "bo,Bob"],
      ["chat", ""],
      ["b**b", "Bob"],
      [`${"*a".repeat(200)}*`, ""],
    ] as const
  ) assert.equal(await found(mask), nicks, mask);
});

test("WHOIS describes a member but never shows an address", async (t) => {
  const { ana, bo } = await two(t);
  bo.send("AWAY :lunch");
  await bo.sync();
  ana.send("WHOIS bo", "WHOIS chat.server bo", "WHOIS nobody");
  const [all] = await ana.wait(/ 311 ana bo bo chat \* :bo X\r\n[\s\S]*? 318 ana bo /);
  for (
    const numeric of [
      / 319 ana bo :#chat\r\n/,
      / 312 ana bo chat\.server /,
      / 301 ana bo :lunch\r\n/,
      / 317 ana bo \d+ \d+ :/,
      / 330 ana bo bo :/,
      / 671 ana bo :/,
    ]
  ) {
    assert.match(all, numeric);
  }
  await ana.wait(/ 318 ana bo /);
  await ana.wait(/ 401 ana nobody .*\r\n.* 318 ana nobody /);
  assert.doesNotMatch(ana.all, /127\.0\.0\.1/);
});

test("WHOWAS describes a member who has left, and nobody else", async (t) => {
  const { ana, bo } = await two(t);
  ana.send("WHOWAS bo", "WHOWAS nobody");
  await ana.wait(/ 406 ana bo .*\r\n.* 369 ana bo .*\r\n.* 406 ana nobody .*\r\n.* 369 ana nobody /);
  bo.send("QUIT");
  await ana.wait(/QUIT/);
  ana.send("WHOWAS BO 1");
  await ana.wait(/ 314 ana bo bo chat \* :bo X\r\n.* 312 ana bo chat\.server :left \w+, \d.*\r\n.* 369 ana BO /);
});

test("an away message is sent to members who write, and announced to clients with away-notify", async (t) => {
  const { ana, bo } = await two(t, {}, "away-notify");
  bo.send("AWAY :lunch");
  await ana.wait(/:bo!bo@chat AWAY :lunch\r\n/);
  ana.send("PRIVMSG bo :there?");
  await ana.wait(/ 301 ana bo :lunch\r\n/);
  bo.send("AWAY");
  await bo.wait(/ 305 bo /);
  await ana.wait(/:bo!bo@chat AWAY\r\n/);
  bo.send("AWAY :out", "JOIN #new");
  ana.send("JOIN #new");
  await ana.sync();
  bo.send("PART #new", "JOIN #new");
  await ana.wait(/:bo!bo@chat JOIN #new\r\n:bo!bo@chat AWAY :out\r\n/);
  assert.doesNotMatch(bo.all, /:bo!bo@chat AWAY/); // who is away knows
});

test("MODE answers queries, accepts +i on oneself without a reply, and refuses every other change", async (t) => {
  const { ana } = await two(t);
  ana.send(
    "MODE #chat",
    "MODE #chat b",
    "MODE #chat +b",
    "MODE #chat +m",
    "MODE #none",
    "MODE ana",
    "MODE ana +z",
    "MODE bo +i",
  );
  await ana.wait(
    / 324 ana #chat \+n\r\n.* 368 ana #chat .*\r\n.* 368 ana #chat .*\r\n.* 482 ana #chat .*\r\n.* 403 ana #none .*\r\n.* 221 ana \+i\r\n.* 501 ana .*\r\n.* 502 ana /,
  );
  await ana.sync();
  ana.send("MODE ana +i");
  assert.match(await ana.sync(), /^:chat\.server PONG [^\n]*\n$/);
});

test("USERHOST, ISON, LUSERS, MOTD, TIME, VERSION and INFO reply with their numerics", async (t) => {
  const { ana } = await two(t);
  ana.send(
    "USERHOST ana bo nobody",
    "ISON ana nobody bo",
    "LUSERS",
    "MOTD",
    "TIME",
    "VERSION",
    "INFO",
    "PING a:b",
    "NICK",
    "NICK 1x",
    "NICK other",
    "NICK bo",
    "USER a 0 * :a",
    "PASS x",
  );
  const all = await ana.sync();
  for (
    const pattern of [
      / 302 ana :ana=\+ana@chat bo=\+bo@chat\r\n/,
      / 303 ana :ana bo\r\n/,
      / 251 ana :/,
      / 254 ana 1 :/,
      / 252 ana 0 :/,
      / 255 ana :/,
      / 265 ana 2 2 :/,
      / 266 ana 2 2 :/,
      / 375 ana :/,
      / 376 ana :/,
      / 391 ana chat\.server :/,
      / 351 ana chat-\S+ chat\.server :/,
      / 371 ana :.*WHOIS/,
      / 374 ana :/,
      /PONG chat\.server a:b\r\n/,
      / 431 ana :/,
      / 432 ana 1x :/,
      / 484 ana :/,
      / 433 ana bo :/,
      / 462 ana :/,
    ]
  ) {
    assert.match(all, pattern);
  }
  assert.ok(all.split("\r\n").every((line) => Buffer.byteLength(line) <= 510));
});

test("a member can change the case of the nick, and everybody is notified", async (t) => {
  const { ana, bo, port } = await two(t);
  ana.send("NICK another");
  await ana.wait(/ 484 ana :/);
  ana.send("NICK ANA");
  await bo.wait(/:ana!ana@chat NICK ANA\r\n/);
  await ana.wait(/:ana!ana@chat NICK ANA\r\n/);
  bo.send("PRIVMSG aNa :hi");
  await ana.wait(/:bo!bo@chat PRIVMSG ANA :hi\r\n/);
  ana.send("QUIT");
  await ana.closed;
  await enter(t, port, "ana");
  await bo.wait(/:ANA!ANA@chat JOIN #chat\r\n/);
});

test("ISUPPORT advertises what the server supports", async (t) => {
  const { ana } = await two(t, { name: "My Net" });
  const support = lines(ana.all, / 005 ana /).join(" ");
  for (
    const token of [
      "NETWORK=My\\x20Net",
      "CASEMAPPING=ascii",
      "UTF8ONLY",
      "CHANTYPES=#",
      "PREFIX=(ov)@+",
      "TARGMAX=PRIVMSG:4,NOTICE:4,TAGMSG:4,JOIN:,PART:,NAMES:,LIST:,WHOIS:1",
      "NICKLEN=20",
      "CHANNELLEN=50",
      "CHATHISTORY=100",
      "MSGREFTYPES=msgid,timestamp",
    ]
  ) {
    assert.ok(support.includes(` ${token} `), token);
  }
});

// ---- Lines and limits

test("a line that is too long or not UTF-8 is refused, and a NUL closes the connection", async (t) => {
  const { port } = await serveHere(t);
  const irc = await enter(t, port, "ana", "message-tags");
  irc.send(`PRIVMSG #chat :${"x".repeat(600)}`);
  await irc.wait(/ 417 ana :Input line was too long\r\n/);
  irc.send(`@${"t".repeat(5000)} PING x`);
  await irc.wait(/ 417 ana :/);
  irc.socket.write(Buffer.from([0x50, 0xff, 0x0d, 0x0a]));
  await irc.wait(/FAIL \* INVALID_UTF8 :/);
  irc.send("CAP REQ labeled-response");
  for (
    const [tags, reply] of [["@label=a", "@label=a"], ["@x;label=b;y=\xff", "@label=b"], ["@label=c;d", "@label=c"]]
  ) {
    irc.socket.write(Buffer.from(`${tags} PRIVMSG #chat :\xff\r\n`, "latin1"));
    await irc.wait(new RegExp(`${reply} :chat\\.server FAIL PRIVMSG INVALID_UTF8 :`));
  }
  for (const length of [600, 6000]) {
    irc.send(`@label=long PRIVMSG #chat :${"x".repeat(length)}`);
    await irc.wait(/@label=long :chat\.server 417 ana :/);
  }
  irc.send(`@label=${"x".repeat(5000)} PING x`);
  await irc.wait(/\n:chat\.server 417 ana :/);
  await irc.sync();
  irc.socket.write("PING \0\r\n");
  await irc.wait(/ERROR :That is not text\r\n/);
  await irc.closed;
});

test("a message that becomes too long with its source is cut to 512 bytes, not inside a character", async (t) => {
  const { ana, bo } = await two(t);
  const text = "ä".repeat(245);
  ana.send(`PRIVMSG #chat :${text}`);
  const [line] = await bo.wait(/^:ana!ana@chat PRIVMSG #chat :ä+\r\n/m);
  assert.ok(Buffer.byteLength(line) <= 512 && Buffer.byteLength(line) > 509);
});

test("a client that speaks HTTP over TLS is disconnected with an explanation", async (t) => {
  const { port } = await serveHere(t);
  const irc = await dial(t, port);
  irc.send("GET / HTTP/1.1", "Host: x", "");
  await irc.wait(/ERROR :This is IRC, not HTTP\r\n/);
  await irc.closed;
});

/**
 * Lets time pass on a server with a fake clock, in steps in which it does not count as asleep, with a sweep after each.
 * @param present clients that send a PING in every step
 */
async function pass(clock: FakeClock, server: chat.Server, ms: number, ...present: readonly Irc[]): Promise<void> {
  for (let left = ms; left > 0; left -= chat.LIMITS.sleepMs) {
    clock.tick(Math.min(left, chat.LIMITS.sleepMs));
    server.sweep();
    for (const irc of present) await irc.sync();
  }
}

test("a client that sends nothing before login is disconnected after a minute", async (t) => {
  const clock = new FakeClock();
  const { port, server } = await serveHere(t, { clock });
  const irc = await dial(t, port);
  await irc.sync();
  await pass(clock, server, chat.LIMITS.silenceMs);
  await irc.sync();
  await pass(clock, server, chat.LIMITS.silenceMs);
  assert.doesNotMatch(irc.all, /ERROR/);
  clock.tick(1);
  server.sweep();
  await irc.wait(/ERROR :You did not log in in time\r\n/);
  await irc.closed;
});

test("a client that sends PINGs but does not log in is disconnected after five minutes", async (t) => {
  const clock = new FakeClock();
  const { port, server } = await serveHere(t, { clock });
  const irc = await dial(t, port);
  await irc.sync();
  await pass(clock, server, chat.LIMITS.loginMs, irc);
  assert.doesNotMatch(irc.all, /ERROR/);
  clock.tick(1);
  server.sweep();
  await irc.wait(/ERROR :You did not log in in time\r\n/);
  await irc.closed;
});

test("a silent member is sent a PING, and times out only if it does not answer", async (t) => {
  const clock = new FakeClock();
  const { ana, bo, server } = await two(t, { clock });
  await pass(clock, server, chat.LIMITS.pingMs, ana);
  assert.doesNotMatch(bo.all, /^PING/m);
  await pass(clock, server, 1, ana);
  await bo.wait(/PING chat\.server\r\n/);
  bo.send("PONG x");
  await bo.sync();
  await pass(clock, server, chat.LIMITS.pingMs, ana);
  assert.doesNotMatch(await bo.sync(), /^PING/m);
  await pass(clock, server, chat.LIMITS.pingMs + 1, ana);
  await bo.wait(/PING chat\.server\r\n/);
  await pass(clock, server, chat.LIMITS.pingMs, ana);
  assert.equal(server.accounts.find("bo")?.sessions.size, 1, "it has a minute to answer");
  await pass(clock, server, 1, ana);
  await bo.closed;
  assert.equal(server.accounts.find("bo")?.sessions.size, 0);
  await ana.sync();
  assert.doesNotMatch(ana.all, / QUIT /);
  await pass(clock, server, chat.LIMITS.graceMs, ana);
  assert.ok(server.accounts.find("bo")?.present, "it stays present for the grace period");
  assert.doesNotMatch(ana.all, / QUIT /);
  await pass(clock, server, 1, ana);
  assert.match(ana.all, /:bo!bo@chat QUIT :Connection lost\r\n/);
  assert.equal(server.accounts.find("bo")?.present, false);
});

test("nobody times out while the machine is asleep", async (t) => {
  const clock = new FakeClock();
  const { port, ana, bo, server } = await two(t, { clock });
  const early = await dial(t, port);
  await early.sync();
  bo.socket.destroy();
  await until(() => server.accounts.find("bo")?.sessions.size === 0, () => "the loss was not noticed");
  clock.tick(24 * 3_600_000);
  server.sweep();
  assert.doesNotMatch(await ana.sync(), /^PING| QUIT /m);
  assert.doesNotMatch(await early.sync(), /ERROR/);
  await pass(clock, server, 1_000);
  await ana.wait(/:bo!bo@chat QUIT :Connection lost\r\n/);
});

// ---- Several connections of one account

test("several connections of an account are one member", async (t) => {
  const { port, ana, bo } = await two(t);
  const desk = await enter(t, port, "ana");
  assert.match(desk.all, /:ana!ana@chat JOIN #chat\r\n.* 353 ana = #chat :ana bo\r\n/);
  assert.doesNotMatch(await bo.sync(), /JOIN/);
  bo.send("PRIVMSG #chat :to all", "PRIVMSG ana :to ana");
  for (const one of [ana, desk]) await one.wait(/PRIVMSG #chat :to all\r\n:bo!bo@chat PRIVMSG ana :to ana\r\n/);
  desk.send("PRIVMSG #chat :from the desk");
  await ana.wait(/:ana!ana@chat PRIVMSG #chat :from the desk\r\n/);
  desk.send("JOIN #more");
  await ana.wait(/:ana!ana@chat JOIN #more\r\n.* 353 ana = #more :ana\r\n/);
  ana.send("PART #more");
  await desk.wait(/:ana!ana@chat PART #more\r\n/);
  bo.send("NAMES #chat", "WHOIS ana");
  await bo.wait(/ 353 bo = #chat :(ana bo|bo ana)\r\n/);
  ana.send("QUIT");
  await ana.closed;
  assert.doesNotMatch(await bo.sync(), /QUIT/);
  desk.send("QUIT :good night");
  await bo.wait(/:ana!ana@chat QUIT :Quit: good night\r\n/);
});

test("a private message is also sent to the sender's other connections that have echo-message", async (t) => {
  const { port, bo } = await two(t);
  const modern = await enter(t, port, "ana", "echo-message");
  const sender = await enter(t, port, "ana");
  sender.send("PRIVMSG bo :psst");
  await bo.wait(/PRIVMSG bo :psst\r\n/);
  await modern.wait(/:ana!ana@chat PRIVMSG bo :psst\r\n/);
});

test("members are not notified of a connection that is lost and reconnects within the grace period", async (t) => {
  const { port, ana, bo } = await two(t);
  bo.send("JOIN #second");
  await bo.sync();
  bo.socket.destroy();
  const back = await enter(t, port, "bo");
  await back.wait(/:bo!bo@chat JOIN #second\r\n/);
  assert.doesNotMatch(await ana.sync(), /QUIT|JOIN/);
  back.send("QUIT");
  await ana.wait(/QUIT/);
});

test("private messages to an absent member are delivered on return, and only once", async (t) => {
  const { port, ana, bo } = await two(t);
  bo.send("QUIT");
  await ana.wait(/:bo!bo@chat QUIT/);
  ana.send("PRIVMSG bo :one", "PRIVMSG bo :two");
  await ana.wait(/ 301 ana bo :Is not here, and will read it on return\r\n/);
  await ana.sync();
  const back = await enter(t, port, "bo", "server-time");
  await back.wait(/^@time=\S+ :ana!ana@chat PRIVMSG bo :one\r\n@time=\S+ :ana!ana@chat PRIVMSG bo :two\r\n/m);
  back.send("QUIT");
  await back.closed;
  const again = await enter(t, port, "bo");
  assert.doesNotMatch(await again.sync(), /PRIVMSG/);
});

test("private messages are replayed until the member sends a line, also if a loss is not noticed yet", async (t) => {
  const { port, ana, bo } = await two(t);
  ana.send("PRIVMSG bo :read");
  await bo.wait(/PRIVMSG bo :read\r\n/);
  bo.send("PONG chat.server");
  await bo.sync();
  ana.send("PRIVMSG bo :lost on the way");
  await ana.sync();
  for (let at = 0; at < 2; at++) { // the first connection that gets them may be lost before it has read them
    const back = await enter(t, port, "bo");
    await back.wait(/PRIVMSG bo :lost on the way\r\n/);
    assert.doesNotMatch(back.all, /:read/);
  }
  const last = await enter(t, port, "bo");
  await last.wait(/PRIVMSG bo :lost on the way\r\n/);
  await last.sync();
  assert.doesNotMatch(await (await enter(t, port, "bo")).sync(), /PRIVMSG/);
});

test("a client with draft/chathistory is sent no missed private messages: it reads them itself", async (t) => {
  const { port, ana, bo } = await two(t);
  bo.send("QUIT");
  await ana.wait(/:bo!bo@chat QUIT/);
  ana.send("PRIVMSG bo :one");
  await ana.sync();
  const back = await enter(t, port, "bo", "batch draft/chathistory");
  back.send("CHATHISTORY LATEST ana * 10");
  await back.wait(/^@batch=\S+ :ana!ana@chat PRIVMSG bo :one\r\n/m);
  assert.equal(lines(back.all, / PRIVMSG bo :one/).length, 1);
});

test("a client that quits between SASL and the welcome leaves the missed private messages for the next one", async (t) => {
  const { port, ana, bo } = await two(t);
  bo.send("QUIT");
  await ana.wait(/:bo!bo@chat QUIT/);
  ana.send("PRIVMSG bo :missed");
  await ana.sync();
  const irc = await dial(t, port);
  irc.send("CAP REQ sasl", "AUTHENTICATE PLAIN", `AUTHENTICATE ${plain("bo", "secret")}`);
  await irc.wait(/ 903 /);
  irc.send("QUIT");
  await irc.wait(/ERROR :Quit\r\n/);
  await (await enter(t, port, "bo")).wait(/PRIVMSG bo :missed\r\n/);
});

// ---- Tags, labels, batches

test("client-only tags are relayed to clients with message-tags, and other tags to nobody", async (t) => {
  const { port, ana } = await two(t);
  const cy = await enter(t, port, "cy", "message-tags echo-message");
  const dee = await enter(t, port, "dee", "message-tags");
  cy.send("@+react=👍;secret=x;+a\\b=c\\:d PRIVMSG #chat :tagged", "@+typing=active TAGMSG #chat");
  await ana.wait(/^:cy!cy@chat PRIVMSG #chat :tagged\r\n/m);
  const [line] = await dee.wait(/^@\S+ :cy!cy@chat PRIVMSG #chat :tagged\r\n@\S+ :cy!cy@chat TAGMSG #chat\r\n/m);
  assert.match(line, /;\+react=👍/);
  assert.match(line, /=c\\:d/);
  assert.match(line, /\+typing=active/);
  assert.doesNotMatch(line, /secret/);
  await cy.wait(/TAGMSG #chat\r\n/);
  assert.doesNotMatch(await ana.sync(), /TAGMSG/);
});

test("the reply to a labelled line is one labelled line, a labelled batch, or an ACK", async (t) => {
  const { port } = await serveHere(t);
  const irc = await enter(t, port, "ana", "labeled-response batch echo-message message-tags");
  irc.send("@label=one PING x");
  await irc.wait(/^@label=one :chat\.server PONG chat\.server x\r\n/m);
  irc.send("@label=two PONG x");
  await irc.wait(/^@label=two :chat\.server ACK\r\n/m);
  irc.send("@label=three WHOIS ana");
  const [whole, , name] = await irc.wait(
    /^(@label=three :chat\.server BATCH \+(\S+) labeled-response\r\n)[\s\S]*?BATCH -\2\r\n/m,
  );
  assert.ok(whole.split("\r\n").slice(1, -2).every((line) => line.startsWith(`@batch=${name} :chat.server `)));
  irc.send("@label=four PRIVMSG #chat :hi");
  await irc.wait(/^@label=four;msgid=\S+ :ana!ana@chat PRIVMSG #chat :hi\r\n/m);
  irc.send("@label=five PRIVMSG nobody :hi");
  await irc.wait(/^@label=five :chat\.server 401 ana nobody /m);
  irc.send("@label=six CHATHISTORY LATEST #chat * 10");
  await irc.wait(/^@label=six :chat\.server BATCH \+(\S+) chathistory #chat\r\n@batch=/m);
  irc.send("@label=seven NONSENSE");
  await irc.wait(/^@label=seven :chat\.server 421 /m);
  irc.send(`@label=${"x".repeat(65)} PING long`);
  await irc.wait(/^:chat\.server PONG chat\.server long\r\n/m);
  irc.send("@label=eight QUIT");
  await irc.wait(/^@label=eight :chat\.server ACK\r\nERROR :Quit\r\n/m);
});

test("a line with an idempotency key is executed once, however often it is sent", async (t) => {
  const { port, bo } = await two(t);
  const caps = "message-tags echo-message";
  const ana = await enter(t, port, "ana", caps);
  const once = (number: number, text: string) => `@chat.local/once=abc-${number} PRIVMSG #chat :${text}`;
  ana.send(once(1, "one"));
  await ana.wait(/^@chat\.local\/once=abc-1;msgid=\S+ :ana!ana@chat PRIVMSG #chat :one\r\n/m);
  ana.send(
    once(1, "one"),
    once(2, "two"),
    "@chat.local/once=abc-3 PRIVMSG nobody :x",
    "@chat.local/once=abc-3 PRIVMSG nobody :x",
  );
  await ana.wait(/^@chat\.local\/once=abc-1 :chat\.server ACK\r\n@chat\.local\/once=abc-2;msgid=\S+ .* :two\r\n/m);
  await ana.wait(/^@chat\.local\/once=abc-3 :chat\.server 401 .*\r\n@chat\.local\/once=abc-3 :chat\.server ACK\r\n/m);
  ana.socket.destroy();
  const back = await enter(t, port, "ana", caps);
  back.send(once(2, "two"), once(4, "four"));
  await back.wait(/^@chat\.local\/once=abc-2 :chat\.server ACK\r\n@chat\.local\/once=abc-4;/m);
  const heard = lines(await bo.sync() && bo.all, /PRIVMSG #chat/);
  assert.deepEqual(heard.map((line) => line.split(" :").at(-1)), ["one", "two", "four"]);
  assert.ok(heard.every((line) => !line.includes("once")), "only the sender sees the key");
});

// ---- History

test("CHATHISTORY reads a log forwards and backwards, in a batch, and within its limits", async (t) => {
  const { port } = await serveHere(t, { history: 150 });
  const ana = await enter(t, port, "ana", "batch message-tags server-time draft/chathistory echo-message");
  for (let at = 0; at < 200; at++) ana.send(`PRIVMSG #chat :m${at}`);
  const ids = new Map<string, string>();
  for (const line of lines(await ana.sync(), /PRIVMSG/)) {
    ids.set(line.split(" :").at(-1) ?? "", /msgid=([^ ;]+)/.exec(line)?.[1] ?? "");
  }
  assert.equal(ids.size, 200);
  const id = (at: number) => `msgid=${ids.get(`m${at}`)}`;
  const read = async (command: string) => {
    ana.send(`CHATHISTORY ${command}`);
    const [, name = "", body = ""] = await ana.wait(
      /:chat\.server BATCH \+(\S+) chathistory #chat\r\n([\s\S]*?):chat\.server BATCH -\1\r\n/,
    );
    const found = body.split("\r\n").filter(Boolean);
    assert.ok(found.every((line) => line.startsWith(`@batch=${name};time=`)));
    const numbers = found.map((line) => Number(line.split(" :m").at(-1)));
    return numbers.length ? [numbers[0], numbers.at(-1), numbers.length] : [];
  };
  assert.deepEqual(await read("LATEST #chat * 10"), [190, 199, 10]);
  assert.deepEqual(await read("LATEST #CHAT * 1000"), [100, 199, 100]);
  assert.deepEqual(await read(`LATEST #chat ${id(195)} 10`), [196, 199, 4]);
  assert.deepEqual(await read(`BEFORE #chat ${id(100)} 10`), [90, 99, 10]);
  assert.deepEqual(await read(`BEFORE #chat ${id(52)} 10`), [50, 51, 2]);
  assert.deepEqual(await read(`AFTER #chat ${id(100)} 10`), [101, 110, 10]);
  assert.deepEqual(await read(`AFTER #chat ${id(10)} 10`), [50, 59, 10]);
  assert.deepEqual(await read(`AROUND #chat ${id(100)} 10`), [95, 104, 10]);
  assert.deepEqual(await read(`AROUND #chat ${id(100)} 1`), [100, 100, 1]);
  assert.deepEqual(await read(`BETWEEN #chat ${id(100)} ${id(110)} 50`), [101, 109, 9]);
  assert.deepEqual(await read(`BETWEEN #chat ${id(100)} ${id(110)} 5`), [101, 105, 5]);
  assert.deepEqual(await read(`BETWEEN #chat ${id(110)} ${id(100)} 5`), [105, 109, 5]);
  assert.deepEqual(await read("AFTER #chat timestamp=2001-01-01T00:00:00.000Z 3"), [50, 52, 3]);
  assert.deepEqual(await read("BEFORE #chat timestamp=2101-01-01T00:00:00.000Z 3"), [197, 199, 3]);
  assert.deepEqual(await read("AFTER #chat timestamp=2101-01-01T00:00:00.000Z 3"), []);
});

test("CHATHISTORY refuses what it cannot read with the codes of the specification", async (t) => {
  const { ana, bo } = await two(t, {}, "batch draft/chathistory");
  bo.send("JOIN #secret", "PRIVMSG #secret :x");
  await bo.sync();
  ana.send("CHATHISTORY LATEST #secret * 10");
  await ana.wait(/FAIL CHATHISTORY INVALID_TARGET LATEST #secret :/);
  ana.send("CHATHISTORY LATEST nobody * 10");
  await ana.wait(/FAIL CHATHISTORY INVALID_TARGET LATEST nobody :/);
  ana.send(
    "CHATHISTORY LATEST #chat * 0",
    "CHATHISTORY LATEST #chat * x",
    "CHATHISTORY SIDEWAYS #chat msgid=1-1 5",
    "CHATHISTORY BEFORE #chat * 5",
    "CHATHISTORY BETWEEN #chat msgid=1-1 5",
    "CHATHISTORY BEFORE #chat msgid=x 5",
  );
  for (let at = 0; at < 6; at++) await ana.wait(/FAIL CHATHISTORY INVALID_PARAMS /);
  ana.send("CHATHISTORY LATEST");
  await ana.wait(/ 461 ana CHATHISTORY /);
  ana.send("CHATHISTORY LATEST bo * 10");
  await ana.wait(/BATCH \+\S+ chathistory bo\r\n:chat\.server BATCH -/);
});

test("only the two members of a private talk can read its history, and TARGETS lists it with their rooms", async (t) => {
  const { port, ana, bo } = await two(t, {}, "batch draft/chathistory");
  ana.send("PRIVMSG bo :one");
  bo.send("PRIVMSG ana :two");
  await Promise.all([ana.sync(), bo.sync()]);
  for (const [one, other] of [[ana, "bo"], [bo, "ana"]] as const) {
    one.send(`CHATHISTORY LATEST ${other.toUpperCase()} * 10`);
    await one.wait(/:ana!ana@chat PRIVMSG bo :one\r\n@batch=\S+ :bo!bo@chat PRIVMSG ana :two\r\n/);
  }
  const cy = await enter(t, port, "cy", "batch draft/chathistory");
  cy.send("CHATHISTORY LATEST ana * 10");
  await cy.wait(/chathistory ana\r\n:chat\.server BATCH -/);
  ana.send(
    "PRIVMSG #chat :three",
    "CHATHISTORY TARGETS timestamp=2001-01-01T00:00:00.000Z timestamp=2101-01-01T00:00:00.000Z 10",
  );
  const [, found = ""] = await ana.wait(/draft\/chathistory-targets\r\n([\s\S]*?):chat\.server BATCH -/);
  assert.deepEqual(lines(found, /./).map((line) => line.split(" ").slice(2, 5).join(" ").replace(/ \d.*/, "")), [
    "CHATHISTORY TARGETS bo",
    "CHATHISTORY TARGETS #chat",
  ]);
  ana.send("CHATHISTORY TARGETS timestamp=2001-01-01T00:00:00.000Z timestamp=2002-01-01T00:00:00.000Z 10");
  await ana.wait(/draft\/chathistory-targets\r\n:chat\.server BATCH -/);
});

test("message ids rise over the whole server, and their times do not go back when the clock does", async (t) => {
  const clock = new FakeClock();
  const { port } = await serveHere(t, { clock });
  const ana = await enter(t, port, "ana", "message-tags echo-message server-time");
  ana.send("PRIVMSG #chat :a");
  await ana.sync();
  const before = clock.wall();
  clock.setWall(before - 3_600_000);
  ana.send("PRIVMSG #chat :b", "JOIN #b", "PRIVMSG #b :c", "PRIVMSG #chat :d");
  await ana.sync();
  clock.setWall(before + 1);
  ana.send("PRIVMSG #chat :e");
  await ana.sync();
  const ids = lines(ana.all, / PRIVMSG #/).map((line) => /msgid=(\d+)-(\d+)/.exec(line)?.slice(1).map(Number) ?? []);
  assert.deepEqual(ids.map(([time]) => time), [before, before, before, before, before + 1]);
  const numbers = ids.map(([, number = 0]) => number);
  assert.deepEqual(numbers, [...new Set(numbers)].sort((one, other) => one - other));
  assert.equal(numbers.length, 5);
});

test("an empty room keeps its log for ten minutes, the first room for ever", async (t) => {
  const clock = new FakeClock();
  const { port, server } = await serveHere(t, { clock });
  const ana = await enter(t, port, "ana", "batch draft/chathistory");
  ana.send("JOIN #x", "PRIVMSG #x :kept", "PART #x", "PART #chat");
  await ana.sync();
  await pass(clock, server, chat.LIMITS.roomIdleMs, ana);
  ana.send("JOIN #x", "CHATHISTORY LATEST #x * 5");
  await ana.wait(/PRIVMSG #x :kept/);
  await pass(clock, server, chat.LIMITS.roomIdleMs + 1, ana);
  ana.send("PART #x");
  await ana.sync();
  await pass(clock, server, chat.LIMITS.roomIdleMs, ana);
  assert.deepEqual([...server.rooms.keys()], ["#chat", "#x"]);
  await pass(clock, server, 1, ana);
  assert.deepEqual([...server.rooms.keys()], ["#chat"]);
});

test("a room in which nothing was said closes when it becomes empty", async (t) => {
  const { port, server } = await serveHere(t);
  const ana = await enter(t, port, "ana");
  ana.send(
    "JOIN #silent,#said",
    "TOPIC #silent :a topic is no message",
    "PRIVMSG #said :something",
    "PART #silent,#said",
  );
  await ana.sync();
  assert.deepEqual([...server.rooms.keys()], ["#chat", "#said"]);
});

// ---- The operator

test("the operator can lock and unlock registration, admit, kick, forget, and say something to everybody", async (t) => {
  const log: string[] = [];
  const { ana, bo, port, server } = await two(t, { log: (line) => log.push(line) }, "cap-notify");
  const order = (name: string, nick = "", rest = "") =>
    [chat.CONSOLE[name]?.run(server, nick, rest) ?? ""].flat().join("\n");
  assert.match(order("who"), /^ana +127\.0\.0\.1 since \d\d:\d\d, idle 0 s\nbo /);
  order("say", "hear", "hear");
  await ana.wait(/:chat\.server NOTICE #chat :hear hear\r\n/);
  order("lock");
  await ana.wait(/CAP ana DEL draft\/account-registration\r\n/);
  const cy = await dial(t, port);
  cy.send("CAP LS 302", "NICK cy", "USER c 0 * :c", "REGISTER * * x");
  await cy.wait(/FAIL REGISTER TEMPORARILY_UNAVAILABLE \* :Registration is closed/);
  assert.doesNotMatch(cy.all, /account-registration/);
  assert.equal(log.at(-1), "cy was refused from 127.0.0.1: registration is closed; the operator can admit a nick");
  cy.send("CAP REQ sasl", "AUTHENTICATE PLAIN", `AUTHENTICATE ${plain("cy", "x")}`);
  await cy.wait(/ 904 cy :SASL authentication failed: Registration is closed/); // not only that there is no account
  order("admit", "cy");
  cy.send("REGISTER * * x");
  await cy.wait(/REGISTER SUCCESS/);
  order("unlock");
  await ana.wait(/CAP ana NEW :?draft\/account-registration=before-connect\r\n/);
  order("kick", "bo", "enough");
  await bo.wait(/ERROR :Kicked: enough\r\n/);
  await ana.wait(/:bo!bo@chat QUIT :Kicked: enough\r\n/);
  await enter(t, port, "bo");
});

test("a barred account or address is disconnected and kept out until the operator lifts that", async (t) => {
  const { bo, port, server } = await two(t);
  const order = (name: string, who: string) => String(chat.CONSOLE[name]?.run(server, who, ""));
  order("bar", "Bo");
  await bo.wait(/ERROR :The operator keeps this account out\r\n/);
  const back = await dial(t, port);
  back.send("PASS secret", "NICK bo", "USER b 0 * :b");
  await back.wait(/ 464 bo :The operator keeps this account out\r\n/);
  assert.match(order("admit", "bo"), /has an account already; \/unbar/);
  order("unbar", "bo");
  back.send("PASS secret");
  await back.wait(/ 001 bo /);
  order("bar", "127.0.0.1");
  await back.wait(/ERROR :The operator keeps your address out\r\n/);
  await (await dial(t, port)).wait(/ERROR :The operator keeps your address out\r\n/);
  assert.match(order("unbar", "127.0.0.1"), /is not barred any more/);
  await enter(t, port, "bo");
});

test("/bar takes addresses as they are printed and written, and takes back what was admitted", async () => {
  const server = new chat.Server();
  const order = (name: string, who: string) => String(chat.CONSOLE[name]?.run(server, who, ""));
  const forms = {
    "10.0.0.1:5000": "10.0.0.1",
    "[2001:DB8:0:1::5]:8080": "2001:db8:0:1::/64",
    "2001:0db8:0:1:0::": "2001:db8:0:1::/64",
    "2001:db8:0:1::/64": "2001:db8:0:1::/64",
    "::ffff:10.0.0.2": "10.0.0.2", // an IPv4 client of a server that listens on IPv6
    "[::ffff:10.0.0.3]:5000": "10.0.0.3",
    "fe80::1%eth0": "fe80:0:0:0::/64",
    "10.0.0.0/8": undefined,
    "ten.zero": undefined,
    Bo: "bo",
  };
  for (const [who, key] of Object.entries(forms)) {
    assert.equal(
      order("bar", who),
      key ? `${key} stays out until /unbar ${key}` : `${who} is neither a nick nor an address`,
    );
    assert.equal(key === undefined || server.accounts.barred.has(key), true, who);
  }
  order("admit", "cy");
  order("bar", "cy");
  assert.equal(await server.accounts.register("cy", "x", { address: "::1", closed: false }), "barred");
});

test("a deleted account's nick cannot be registered until the operator admits it, and then once", async (t) => {
  const { bo, port, server } = await two(t);
  const order = (name: string, who: string) => String(chat.CONSOLE[name]?.run(server, who, ""));
  order("forget", "bo");
  await bo.wait(/ERROR :The account was deleted/);
  const fresh = await dial(t, port);
  fresh.send("PASS other", "NICK bo", "USER b 0 * :b");
  await fresh.wait(/ 464 bo :The operator has deleted this account, and can admit the nick again\r\n/);
  order("admit", "bo");
  fresh.send("PASS other");
  await fresh.wait(/bo is registered now/);
  order("forget", "bo");
  assert.match(order("unbar", "bo"), /is not barred any more/);
  await enter(t, port, "bo", "", "a third one");
});

test("a password that begins like a verifier registers and logs in by PASS, PLAIN, REGISTER and SCRAM", async (t) => {
  const { port } = await serveHere(t);
  const roads = ["PASS", "REGISTER"] as const;
  for (const [at, password] of ["SCRAM-", "SCRAM-SCRYPT$32768:x", "scram-scrypt$a:b$c:d"].entries()) {
    for (const road of roads) {
      const nick = `${road}${at}`;
      const first = await dial(t, port);
      if (road === "PASS") first.send(`PASS ${password}`, `NICK ${nick}`, "USER u 0 * :u");
      else first.send("CAP LS", `NICK ${nick}`, "USER u 0 * :u", `REGISTER * * ${password}`, "CAP END");
      await first.wait(/ 001 /);
      await enter(t, port, nick, "", password);
      const plain = await dial(t, port);
      const message = Buffer.from(`\0${nick}\0${password}`).toString("base64");
      plain.send("CAP REQ sasl", `NICK ${nick}`, "USER u 0 * :u", "AUTHENTICATE PLAIN", `AUTHENTICATE ${message}`);
      await plain.wait(/ 903 /);
      const scram = chat.scramClient(
        nick,
        (salt) => chat.deriveKeys(password, salt),
        crypto.createHash("sha256").update(plain.socket.getPeerX509Certificate()?.raw ?? "").digest(),
      );
      const by = await dial(t, port);
      by.send("CAP REQ sasl", `NICK ${nick}`, "USER u 0 * :u", "AUTHENTICATE SCRAM-SCRYPT-PLUS");
      await by.wait(/AUTHENTICATE \+\r\n/);
      for (let step = await scram.next(); !step.done;) {
        by.send(`AUTHENTICATE ${Buffer.from(step.value).toString("base64")}`);
        const [, answer = ""] = await by.wait(/AUTHENTICATE (\S+)\r\n/);
        step = await scram.next(Buffer.from(answer, "base64").toString());
      }
      by.send("AUTHENTICATE +");
      await by.wait(/ 903 /);
    }
  }
});

test("the password of PASS is forgotten when another way to log in has succeeded", async (t) => {
  const { port, server } = await serveHere(t);
  const irc = await dial(t, port);
  irc.send("CAP LS", "PASS unused", "NICK ana", "USER a 0 * :a", "REGISTER * * secret");
  await irc.wait(/ 900 /);
  const [session] = server.sessions;
  assert.equal(session?.registration?.password, "");
});

// ---- Limits

test("connections are limited in all and per network", async (t) => {
  const { port } = await serveHere(t, { perAddress: 2, maxClients: 3 });
  await enter(t, port, "ana");
  await enter(t, port, "bo");
  const third = await dial(t, port);
  await third.wait(/ERROR :Too many connections from your address\r\n/);
  await third.closed;
  const full = await serveHere(t, { maxClients: 1 });
  await enter(t, full.port, "ana");
  await (await dial(t, full.port)).wait(/ERROR :The server is full\r\n/);
});

/** The other end of a connection without a socket. It takes everything that is written to it at once. */
class TestPeer implements chat.Peer {
  readonly address: string;
  readonly session: chat.Session;
  written = "";
  isRead = true;
  isEnded = false;

  constructor(server: chat.Server, address = "192.0.2.1") {
    this.address = address;
    this.session = server.open(this);
  }

  write(bytes: Buffer): boolean {
    this.written += bytes;
    return true;
  }

  pending(): number {
    return 0;
  }

  read(flowing: boolean): void {
    this.isRead = flowing;
  }

  end(): void {
    this.isEnded = true;
  }

  /** Receives lines that end with a bare LF, in one chunk. */
  send(...texts: readonly string[]): void {
    this.session.inbox.push(Buffer.from(texts.map((text) => `${text}\n`).join("")));
  }

  wait(pattern: RegExp): Promise<void> {
    return until(() => pattern.test(this.written), () => `no ${pattern} in:\n${this.written.slice(-1000)}`, 5_000);
  }
}

test("a full server says so, and a login does not make a member's connection too many", async () => {
  const server = new chat.Server({ clock: new FakeClock(), maxClients: 2 });
  const peers = ["ana", "bo", "cy"].map((nick) => ({ nick, peer: new TestPeer(server) }));
  const logIn = (peer: TestPeer | undefined, nick: string) =>
    peer?.send(`PASS secret`, `NICK ${nick}`, `USER u 0 * :u`);
  for (const { nick, peer } of peers.slice(0, 2)) {
    logIn(peer, nick);
    await peer.wait(/ 366 /);
  }
  logIn(peers[2]?.peer, "cy");
  await peers[2]?.peer.wait(/ERROR :The server is full\r\n/);
  assert.match(new TestPeer(server).written, /^ERROR :The server is full\r\n$/);
});

/** A server with a member whose client takes everything, and so many rooms that LIST fills more than the queue. */
async function withLongList(): Promise<TestPeer> {
  const server = new chat.Server({ clock: new FakeClock(), rate: 0 });
  for (let at = 0; server.rooms.size < chat.LIMITS.rooms; at++) {
    const room = server.openRoom(`#room-${at}`);
    room.topic = server.happens(room, "TOPIC", "ana", "x".repeat(chat.LIMITS.topic));
  }
  const peer = new TestPeer(server);
  peer.send("CAP REQ labeled-response", "PASS secret", "NICK ana", "USER ana 0 * :Ana", "CAP END");
  await peer.wait(/ 366 /);
  peer.written = "";
  return peer;
}

test("reading resumes after a reply that fills the outgoing queue, with the lines that come later", async () => {
  const peer = await withLongList();
  peer.send("LIST");
  await peer.wait(/ 323 ana /);
  assert.ok(peer.written.length > chat.LIMITS.pauseBytes);
  await until(() => peer.isRead, () => "reading is still paused", 5_000);
  for (const token of ["one", "two", "three"]) {
    peer.send(`PING ${token}`);
    await peer.wait(new RegExp(`PONG chat\\.server ${token}\r\n`));
  }
  assert.ok(peer.isRead);
});

test("lines behind one whose reply fills the outgoing queue are executed in order, and reading resumes", async () => {
  for (const list of ["LIST", "@label=x LIST"]) {
    const peer = await withLongList();
    peer.send(list, "PING one", list, list, "PING two");
    await peer.wait(/PONG chat\.server two\r\n/);
    const order = lines(peer.written, / 323 | PONG /).map((line) => line.split(" ").at(-1));
    assert.deepEqual(order, ["/LIST", "one", "/LIST", "/LIST", "two"]);
    await until(() => peer.isRead, () => "reading is still paused", 5_000);
    peer.send("PING three");
    await peer.wait(/PONG chat\.server three\r\n/);
  }
});

test("a client that closes its side gets the replies to everything that it sent before, however long", async () => {
  const peer = await withLongList();
  peer.send("LIST", "LIST", "PING last");
  peer.session.inbox.end();
  await peer.wait(/PONG chat\.server last\r\n/);
  await until(() => peer.isEnded, () => "the connection is still open", 5_000);
  assert.equal(lines(peer.written, / 323 /).length, 2);
});

test("the rooms of a member are limited, and so are all rooms together", async (t) => {
  const { port, server } = await serveHere(t);
  const ana = await enter(t, port, "ana");
  for (let at = 1; at < chat.LIMITS.roomsPerMember; at++) ana.send(`JOIN #r${at}`);
  ana.send("JOIN #toomany");
  await ana.wait(/ 405 ana #toomany /);
  const bo = await server.accounts.register("bo", "secret", { address: "127.0.0.1", closed: false });
  assert.ok(typeof bo !== "string");
  for (let at = server.rooms.size; at < chat.LIMITS.rooms; at++) server.openRoom(`#o${at}`).members.add(bo);
  ana.send("PRIVMSG #r1 :something", "PART #r1", "JOIN #one");
  await ana.wait(/ 366 ana #one /);
  assert.equal(server.rooms.has("#r1"), false, "an empty room is closed for it, with its log");
  server.rooms.get("#r2")?.members.add(bo);
  ana.send("PART #r2", "JOIN #two");
  await ana.wait(/ 437 ana #two /);
  assert.equal(server.rooms.size, chat.LIMITS.rooms);
});

test("at the limit of rooms the one that has been empty for longest is closed", async (t) => {
  const clock = new FakeClock();
  const { port, server } = await serveHere(t, { clock });
  const ana = await enter(t, port, "ana");
  const names = ["#first", "#second", "#third"];
  for (const name of names) ana.send(`JOIN ${name}`, `PRIVMSG ${name} :something`);
  await ana.sync();
  for (const name of ["#second", "#first", "#third", "#second"]) {
    clock.tick(1);
    ana.send(`JOIN ${name}`, `PART ${name}`);
    await ana.sync();
  }
  for (let at = server.rooms.size; at < chat.LIMITS.rooms; at++) {
    server.openRoom(`#o${at}`).emptySince = clock.now() + 1;
  }
  for (const [at, name] of ["#first", "#third", "#second"].entries()) {
    assert.ok(server.rooms.has(name), name);
    ana.send(`JOIN #new${at}`);
    await ana.sync();
    assert.equal(server.rooms.has(name), false, name);
    assert.equal(server.rooms.size, chat.LIMITS.rooms);
  }
});

test("history is limited in bytes, and the log longest without a message loses its messages first", () => {
  const history = new chat.History(1_000_000);
  const [old, recent] = [new chat.Log(), new chat.Log()];
  const happened = { kind: "PRIVMSG", nick: "a", target: "b", tags: [] } as const;
  const text = "x".repeat(100_000);
  for (let at = 0; at < 100; at++) history.record(old, { ...happened, text });
  for (let at = 0; at < 1000; at++) history.record(recent, { ...happened, text });
  const kept = [old, recent].map((log) => log.messages.length);
  assert.equal(kept[0], 0);
  assert.ok(Math.abs((kept[1] ?? 0) - chat.LIMITS.historyBytes / 200_500) < 2);
});

test("a labelled reply is sent although its line ends the connection", async (t) => {
  const { port } = await serveHere(t);
  await enter(t, port, "ana");
  const irc = await dial(t, port);
  irc.send("CAP REQ :labeled-response batch message-tags", "NICK ana", "USER a 0 * :a", "CAP END");
  for (const label of ["one", "two", "three"]) {
    irc.send(`@label=${label} PASS wrong`);
    await irc.wait(new RegExp(`@label=${label} :chat\\.server 464 ana :Wrong password\r\n`));
  }
  await irc.wait(/ERROR :Too many wrong passwords\r\n/);
});

// deno-lint-ignore-file no-regex-spaces no-control-regex -- screens are matched as they stand, blanks and escapes included
// What a person sees and types: the built executable in tmux.
import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";
import { cells, type Server } from "../chat.ts";
import {
  BINARY,
  enter,
  type Irc,
  type Runtime,
  RUNTIMES,
  serveHere,
  serveProcess,
  Terminal,
  wants,
} from "./helpers.ts";

const TMUX = wants("tmux");

/** A terminal that has joined, and bo, who is in the room as well. */
async function joined(
  t: TestContext,
  { columns = 80, rows = 24, args = [] as readonly string[], runtime = "binary" as Runtime, env = {} } = {},
): Promise<{ ana: Terminal; bo: Irc; port: number; server: Server }> {
  const { port, server } = await serveHere(t);
  const bo = await enter(t, port, "bo");
  const command = [...RUNTIMES[runtime](), "join", `ana@127.0.0.1:${port}`, ...args];
  const ana = new Terminal(t, command, { columns, rows, env: { CHAT_PASSWORD: "secret", ...env } });
  await bo.wait(/:ana!ana@chat JOIN #chat/);
  await ana.wait(/^#chat> *$|^Welcome to/m);
  return { ana, bo, port, server };
}

/** What a hostile text would change about a terminal: its title, its screen, its modes. */
const stateOf = (terminal: Terminal) =>
  terminal.ask(
    "#{pane_title}|#{alternate_on}|#{cursor_flag}|#{insert_flag}|#{keypad_flag}|#{mouse_any_flag}|#{origin_flag}|#{wrap_flag}|#{scroll_region_upper}|#{scroll_region_lower}",
  );

for (const runtime of Object.keys(RUNTIMES) as Runtime[]) {
  test(`a newcomer is led into the room on ${runtime}`, TMUX, async (t) => {
    const { port } = await serveHere(t);
    const bo = await enter(t, port, "bo");
    bo.send("PRIVMSG #chat :said before");
    await bo.sync();
    const ana = new Terminal(t, [...RUNTIMES[runtime](), "join", `127.0.0.1:${port}`]);
    await ana.wait(/^127\.0\.0\.1 is this machine: took its key ([a-z2-7]{4}-?){6} unchecked\nNick:/m);
    ana.enter("2fast");
    await ana.wait(/-- A nick has 1 to 20/);
    ana.enter("ana");
    await ana.wait(/Password:$/);
    ana.enter("secret");
    await ana.wait(/No account ana here yet\. The same password again registers it:$/);
    ana.enter("secrte");
    await ana.wait(/-- these were two different passwords/);
    await ana.wait(/Password:$/);
    ana.enter("secret");
    await ana.wait(/registers it:$/);
    ana.enter("secret");
    await ana.wait(/\d\d:\d\d bo    said before\nWelcome to #chat, ana\. Here: bo\. \/help lists/);
    bo.send("PRIVMSG #chat :morning");
    await ana.wait(/^\d\d:\d\d bo    morning\n#chat>$/m);
    ana.enter("hello");
    await bo.wait(/:ana!ana@chat PRIVMSG #chat :hello\r\n/);
    await ana.wait(/^\d\d:\d\d bo    morning\n\d\d:\d\d ana   hello\n#chat>$/m);
    bo.send("QUIT");
    await ana.wait(/^-- bo left$/m);
    assert.doesNotMatch(ana.screen({ history: true }), /secr/);
    ana.enter("/exit");
    await ana.wait(/^\[exit 0\]$/m);
  });
}

test("a password is never on the screen, and the arrow keys do not bring it back", TMUX, async (t) => {
  const { port } = await serveHere(t);
  const ana = new Terminal(t, [BINARY, "join", `ana@127.0.0.1:${port}`]);
  await ana.wait(/Password:$/);
  for (const char of "hunter2") {
    ana.type(char);
    assert.doesNotMatch(ana.screen(), /h|2$/i.test(char) ? /Password:.*\S/ : /hunter/);
  }
  ana.keys("Left", "Up", "Tab", "C-a", "C-e", "Enter");
  await ana.wait(/registers it:$/);
  ana.enter("hunter2");
  await ana.wait(/Welcome/);
  ana.keys("Up", "Up");
  ana.type("x");
  await ana.wait(/^#chat> x$/m);
  assert.doesNotMatch(ana.screen({ history: true }), /hunter|unter/);
});

test("a wrong password gets a line why and the question again, and three of them the end", TMUX, async (t) => {
  const { port } = await serveHere(t);
  await enter(t, port, "ana", "", "right");
  const ana = new Terminal(t, [BINARY, "join", `ana@127.0.0.1:${port}`]);
  for (let tries = 1; tries <= 3; tries++) {
    await ana.wait(new RegExp(`(Password:\\n-- ana is registered here.*\\n){${tries - 1}}Password:$`));
    ana.enter("wrong");
  }
  await ana.wait(/chat: too many wrong passwords\nchat: hint: .*\n\[exit 1\]/);
});

for (const columns of [40, 20, 80]) {
  test(`a half-typed line is not disturbed in ${columns} columns, by whatever arrives`, TMUX, async (t) => {
    const { ana, bo } = await joined(t, { columns, rows: 20 });
    const typed = "this line is half typed, longer than the terminal is wide, and has 日本語, 😀 and e\u0301 in it";
    ana.type(typed);
    const expected = `#chat> ${typed}`.replaceAll(" ", "");
    const whole = () => ana.untilTyped(expected);
    await whole();
    for (let at = 0; at < 5; at++) {
      bo.send(`PRIVMSG #chat :${`message ${at} 日本語 with many words `.repeat(at + 1)}end${at}`);
      await ana.wait(new RegExp(`end${at}\\n#chat> t`));
      await whole();
      assert.equal(ana.screen().split("#chat> ").length, 2, "the prompt is there once");
    }
    ana.keys("Home");
    ana.type("X");
    bo.send("PRIVMSG #chat :one more");
    await ana.wait(/one more\n#chat> Xt/);
    ana.keys("Enter");
    await bo.wait(/PRIVMSG #chat :Xthis line is half typed/);
    await ana.wait(/^#chat>$/m);
  });
}

test("the cursor is where one types, also in a line that wraps", TMUX, async (t) => {
  const { ana } = await joined(t, { columns: 30 });
  const at = () => ana.ask("#{cursor_x} #{cursor_y}").split(" ").map(Number);
  ana.type("ab日本語");
  await ana.wait(/ab日本語$/);
  assert.equal(at()[0], cells("#chat> ab日本語"));
  ana.keys("Left", "Left");
  ana.type("😀");
  await ana.wait(/ab日😀本語$/);
  assert.equal(at()[0], cells("#chat> ab日😀"));
  ana.keys("End");
  ana.type(" and then some more words than fit");
  await ana.wait(/than fit$/);
  const [x, y] = at();
  const rows = ana.screen().split("\n");
  assert.equal(y, rows.length - 1);
  assert.equal(x, cells(rows.at(-1) ?? ""));
});

test("a resize in mid-typing leaves one prompt with the whole line, and the messages above it", TMUX, async (t) => {
  const { ana, bo } = await joined(t, { columns: 60 });
  for (let at = 0; at < 5; at++) bo.send(`PRIVMSG #chat :message number ${at} with a few words`);
  await ana.wait(/number 4/);
  const typed = "a line of some length that was typed before the window changed its width";
  ana.type(typed);
  const expected = `#chat>${typed.replaceAll(" ", "")}`;
  await ana.untilTyped(expected);
  for (const columns of [40, 25, 70, 33, 100]) {
    ana.resize(columns, 24);
    const first = `#chat> ${typed}`.slice(0, columns - 1); // as the program draws it, once it has been told
    await ana.wait(new RegExp(`^${first.replace(/[#>]/g, ".")}$`, "m"));
    await ana.untilTyped(expected);
    bo.send(`PRIVMSG #chat :at ${columns}`);
    await ana.wait(new RegExp(`at ${columns}\\n#chat> a line`));
    await ana.untilTyped(expected);
    assert.equal(ana.screen().split("#chat> ").length, 2);
  }
});

test("thousands of lines may arrive while one types: the line is whole, and everything was shown", TMUX, async (t) => {
  const { ana, bo } = await joined(t);
  const lines = 10_000;
  // In bursts that a busy machine can follow: one that is owed a mebibyte is closed, which is another test's business.
  const burst = async (from: number) => {
    for (let at = from; at < from + 1000; at++) bo.send(`PRIVMSG #chat :flood ${at}`);
    await ana.wait(new RegExp(`flood ${from + 999}\\n`));
  };
  await burst(0);
  for (const char of "typed meanwhile") ana.type(char);
  for (let from = 1000; from < lines; from += 1000) await burst(from);
  await ana.wait(new RegExp(`flood ${lines - 1}\\n#chat> typed meanwhile$`));
  const seen = ana.screen({ history: true });
  assert.match(seen, new RegExp(`flood ${lines - 1000}\\n`));
  ana.keys("Enter");
  await bo.wait(/PRIVMSG #chat :typed meanwhile/);
});

test("what others send does not touch the terminal, whatever bytes and characters it has", TMUX, async (t) => {
  const { ana, bo } = await joined(t, { columns: 80, rows: 24 });
  const before = stateOf(ana);
  const sequences = [
    "\x1b]0;owned\x07",
    "\x1b[2J",
    "\x1b[?1049h",
    "\x1b[?25l",
    "\x1b[31m",
    "\x1bc",
    "\x1b[6n",
    "\x1b[10;10H",
    "\x1b(0",
    "\x9b2J",
    "\x9d0;owned\x9c",
    '\x1bP$q"p\x1b\\',
    "\x1b]52;c;b3duZWQ=\x07",
  ];
  for (const one of sequences) bo.send(`PRIVMSG #chat :a${one}b`);
  for (let byte = 1; byte < 256; byte++) {
    if (byte === 10 || byte === 13) continue;
    const char = Buffer.from([byte]);
    bo.socket.write(Buffer.concat([Buffer.from(`PRIVMSG #chat :byte ${byte} <`), char, Buffer.from(">\r\n")]));
  }
  const odd: string[] = [];
  for (let code = 0x80; code <= 0x10ffff; code++) {
    if (code >= 0xd800 && code <= 0xdfff) continue;
    const char = String.fromCodePoint(code);
    if (/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{DI}]/u.test(char) && code !== 0xfe0f) odd.push(char);
  }
  for (let at = 0; at < odd.length; at += 20) bo.send(`PRIVMSG #chat :odd <${odd.slice(at, at + 20).join("")}>`);
  for (const command of ["TOPIC #chat :", "NOTICE #chat :", "PRIVMSG ana :", "PRIVMSG #chat :\x01ACTION "]) {
    bo.send(`${command}x\x1b[2J\u202ey\x07`);
  }
  bo.send("PRIVMSG #chat :the end");
  await ana.wait(/the end\n#chat>$/);
  assert.equal(stateOf(ana), before);
  const seen = ana.screen({ history: true });
  assert.match(seen, /a�\]0;owned�b/);
  assert.match(seen, /byte 27 <�>/);
  assert.match(seen, /byte 65 <A>/);
  assert.doesNotMatch(seen, /[\u0080-\u009f\u202a-\u202e\u2066-\u2069\u200b-\u200f]/);
  const colours = ana.screen({ escapes: true }).split("\n").filter((line) => line.includes("the end"));
  assert.doesNotMatch(colours.join(""), /\x1b\[31m/);
});

test("no parameter of any line from a server reaches the terminal uncleaned", TMUX, async (t) => {
  const { ana, server } = await joined(t, { columns: 200, rows: 50 });
  const [session] = [...server.sessions].filter(({ nick }) => nick === "ana");
  assert.ok(session);
  const before = stateOf(ana);
  const evil = "\x1b]0;owned\x07\x1b[2J\x1b[?25l\x9b4h";
  const numerics = Array.from({ length: 1000 }, (_, code) => String(code).padStart(3, "0"));
  for (
    const command of [...numerics, ..."NICK KICK FAIL NOTE WARN ERR NOTICE PRIVMSG TOPIC JOIN PART QUIT".split(" ")]
  ) {
    const words = command === "322" || Number(command) % 2 ? ["ana", evil, evil, evil] : ["ana", "#chat", evil, evil];
    session.answer(`:${evil}!x@chat ${command} ${words.join(" ")} :${evil} ${command}`);
  }
  session.answer(`:bo!bo@chat PRIVMSG #chat :the end`);
  await ana.wait(/the end\n\S+> *$/);
  assert.equal(stateOf(ana), before);
  ana.enter("/who");
  ana.enter("/topic");
  ana.enter("/help");
  await ana.wait(/-- \/\/TEXT/);
  assert.equal(stateOf(ana), before);
  assert.match(ana.screen({ history: true }), /-- �\]0;owned�.*: �\]0;owned\S* in it; �/);
});

for (const runtime of ["binary", "deno"] as const) {
  test(
    `what comes in one piece is typed line by line, unless it is a bracketed paste (${runtime})`,
    TMUX,
    async (t) => {
      const { ana, bo } = await joined(t, { runtime });
      ana.type("/msg bo secret\rfirst\r//second\r/me thinks\rhalf");
      await bo.wait(
        /PRIVMSG bo :secret\r\n.*PRIVMSG #chat :first\r\n.*PRIVMSG #chat :\/second\r\n.*PRIVMSG #chat :\x01ACTION thinks\x01\r\n/,
      );
      await ana.wait(/^#chat> half$/m);
      ana.keys("Enter");
      await bo.wait(/PRIVMSG #chat :half\r\n/);
      assert.doesNotMatch(bo.all, /#chat :.*secret/);
    },
  );

  test(`a pasted command is run or said only when the person has answered (${runtime})`, TMUX, async (t) => {
    const { ana, bo } = await joined(t, { runtime, columns: 120 });
    ana.paste("/msg bo secret\n");
    await ana.wait(/^Run the pasted "\/msg bo secret", or say it in #chat\? \(run\/say\/no\)$/m);
    ana.enter("no");
    await ana.wait(/-- nothing is sent\n#chat>$/);
    ana.paste("/msg bo secret\n");
    await ana.wait(/\(run\/say\/no\)$/);
    ana.enter("run");
    await bo.wait(/PRIVMSG bo :secret\r\n/);
    ana.paste("one\n/me waves\n/etc/hosts\n/exit\nrest");
    await ana.wait(/Run the pasted "\/me waves" and 1 more command, or say all 4 pasted lines in #chat\?/);
    ana.enter("say");
    await bo.wait(/ :one\r\n.* :\/me waves\r\n.* :\/etc\/hosts\r\n.* :\/exit\r\n/);
    await ana.wait(/^#chat> rest$/m); // it was put aside, and did not answer the question
    ana.keys("C-u");
    ana.paste("one\n/me waves\n/etc/hosts\n");
    await ana.wait(/or say all 3 pasted lines in #chat\? \(run\/say\/no\)$/);
    ana.enter("run");
    await bo.wait(/ :one\r\n.* :\x01ACTION waves\x01\r\n.* :\/etc\/hosts\r\n/);
    assert.doesNotMatch(bo.all, /#chat :.*secret/);
  });
}

test("pasted lines are sent in order, and more than five only after a question", TMUX, async (t) => {
  const { ana, bo } = await joined(t);
  ana.paste("one\ntwo\nthree\nrest");
  await bo.wait(/ :one\r\n.* :two\r\n.* :three\r\n/);
  await ana.wait(/^#chat> rest$/m);
  ana.keys("C-u");
  ana.paste("if x:\n\treturn\n");
  await bo.wait(/PRIVMSG #chat :if x:\r\n:ana!ana@chat PRIVMSG #chat :\treturn\r\n/);
  const many = Array.from({ length: 300 }, (_, at) => `line ${at} ${"x".repeat(40)}`);
  ana.paste(`${many.join("\n")}\n`);
  await ana.wait(/Send these 300 lines\? \(yes\/no\)$/);
  ana.enter("no");
  await ana.wait(/^#chat>$/m);
  ana.paste(many.join("\n"));
  await ana.wait(/\(yes\/no\)$/);
  ana.enter("yes");
  await bo.wait(/line 298 /);
  await ana.wait(/^#chat> line 299 x+$/m);
  ana.keys("Enter");
  await bo.wait(/line 299 /);
  const heard = [...bo.all.matchAll(/PRIVMSG #chat :(line .*)\r\n/g)].map(([, line]) => line);
  assert.deepEqual(heard, many);
});

test("a paste into a line stays where the cursor is, and is one line in a command or an answer", TMUX, async (t) => {
  const { ana, bo } = await joined(t);
  ana.type("see  there");
  ana.keys(...Array.from("there ", () => "Left"));
  ana.paste("https://example.org/\x1b[31mx");
  await ana.wait(/^#chat> see https:\/\/example\.org\/\[31mx there$/m);
  ana.type("!");
  ana.keys("Enter");
  await bo.wait(/PRIVMSG #chat :see https:\/\/example\.org\/\[31mx! there\r\n/);
  ana.type("/msg bo ");
  ana.paste("my number\nis 12345\n");
  await ana.wait(/^#chat> \/msg bo my number is 12345$/m);
  ana.keys("Enter");
  await bo.wait(/PRIVMSG bo :my number is 12345\r\n/);
  ana.enter("/password");
  for (const question of [/New password:$/, /The same again:$/]) {
    await ana.wait(question);
    ana.paste("correct horse\n");
    ana.keys("Enter");
  }
  await ana.wait(/-- your password is changed/);
  assert.doesNotMatch(ana.screen({ history: true }), /horse/);
  assert.doesNotMatch(bo.all, /#chat :.*(number|12345|horse)/);
});

for (const runtime of ["binary", "deno"] as const) {
  test(`Ctrl-C cancels the question, or clears the line; with neither it leaves (${runtime})`, TMUX, async (t) => {
    const { ana, bo } = await joined(t, { runtime });
    ana.type("not what I meant");
    await ana.wait(/meant$/);
    ana.keys("C-c");
    await ana.wait(/^#chat>$/m);
    ana.enter("/password");
    await ana.wait(/New password:$/);
    ana.type("half");
    ana.keys("C-c");
    await ana.wait(/-- nothing is changed\n#chat>$/);
    ana.enter("/password");
    await ana.wait(/New password:$/);
    ana.enter("whole");
    await ana.wait(/The same again:$/);
    ana.keys("C-d");
    await ana.wait(/The same again:\n-- nothing is changed\n#chat>$/);
    ana.enter("still here");
    await bo.wait(/PRIVMSG #chat :still here\r\n/);
    ana.keys("C-c");
    await bo.wait(/:ana!ana@chat QUIT :Quit\r\n/);
    await ana.wait(/\[exit 0\]/);
  });

  test(
    `at the operator's console Ctrl-C clears the line, and a room that is not empty is stopped only when that is confirmed (${runtime})`,
    TMUX,
    async (t) => {
      for (const stop of ["C-c", "C-d", "/stop"]) {
        const server = new Terminal(t, [...RUNTIMES[runtime](), "serve", "127.0.0.1:0"], { columns: 200 });
        const [, port] = await server.wait(/join 127\.0\.0\.1:(\d+)\//);
        await server.wait(/\n>$/);
        const bo = await enter(t, Number(port), "bo");
        await server.wait(/bo logged in .*\n>$/);
        server.type("/say half");
        await server.wait(/\n> \/say half$/);
        server.keys("C-d");
        server.keys("C-c");
        await server.wait(/\n>$/);
        const again = () => stop.startsWith("/") ? server.enter(stop) : server.keys(stop);
        again();
        await server.wait(/-- 1 person is here; again to stop\n>$/);
        await bo.sync();
        again();
        await bo.wait(/ERROR :The server is stopping\r\n/);
        await server.wait(/stopping\n\[exit 0\]/);
      }
    },
  );
}

test("an empty room is stopped without a question", TMUX, async (t) => {
  const server = new Terminal(t, [BINARY, "serve", "127.0.0.1:0"]);
  await server.wait(/\n>$/);
  server.keys("C-c");
  await server.wait(/stopping\n\[exit 0\]/);
});

test("Ctrl-C at the question for a nick or a password ends the program", TMUX, async (t) => {
  const { port } = await serveHere(t);
  for (const [who, question] of [["", /Nick:$/], ["ana@", /Password:$/]] as const) {
    const ana = new Terminal(t, [BINARY, "join", `${who}127.0.0.1:${port}`]);
    await ana.wait(question);
    ana.keys("C-c");
    await ana.wait(/chat: cancelled\n\[exit 1\]/);
  }
});

test("Tab completes nicks, commands and rooms, and goes on to the next", TMUX, async (t) => {
  const { ana, bo, port } = await joined(t);
  await enter(t, port, "bob");
  await ana.wait(/bob joined/);
  ana.type("bo");
  ana.keys("Tab");
  await ana.wait(/^#chat> bo:$/m);
  ana.keys("Tab");
  await ana.wait(/^#chat> bob:$/m);
  ana.keys("Tab");
  await ana.wait(/^#chat> bo:$/m);
  ana.type("hi B");
  ana.keys("Tab");
  await ana.wait(/^#chat> bo: hi bo$/m);
  ana.keys("Enter");
  await bo.wait(/PRIVMSG #chat :bo: hi bo ?\r\n/);
  ana.type("/to");
  ana.keys("Tab");
  ana.type("x");
  await ana.wait(/^#chat> \/topic x$/m);
  ana.keys("C-u");
  ana.type("see #ch");
  ana.keys("Tab");
  await ana.wait(/^#chat> see #chat$/m);
  ana.keys("C-u", "Tab");
  ana.type("zz");
  ana.keys("Tab");
  await ana.wait(/^#chat> zz$/m);
});

test("Up and Down bring back what was said", TMUX, async (t) => {
  const { ana, bo } = await joined(t);
  ana.enter("first");
  ana.enter("second");
  await bo.wait(/second/);
  ana.keys("Up", "Up");
  await ana.wait(/^#chat> first$/m);
  ana.keys("Down");
  await ana.wait(/^#chat> second$/m);
});

test("the slash commands do what they say", TMUX, async (t) => {
  const { ana, bo, port } = await joined(t, { rows: 40 });
  const cy = await enter(t, port, "cy");
  ana.enter("/help");
  await ana.wait(/-- \/exit .*leave/);
  await ana.wait(/-- \/msg NICK TEXT/);
  ana.enter("/help msg");
  await ana.wait(/-- \/msg NICK TEXT .*\n#chat>$/);
  ana.enter("/who");
  await ana.wait(/-- 3 people in #chat: /);
  ana.enter("/msg cy psst");
  await cy.wait(/:ana!ana@chat PRIVMSG cy :psst\r\n/);
  await ana.wait(/^\d\d:\d\d ana > cy psst$/m);
  cy.send("PRIVMSG ana :yes?");
  await ana.wait(/^\d\d:\d\d cy > ana yes\?$/m);
  ana.enter("/r nothing");
  await cy.wait(/PRIVMSG cy :nothing\r\n/);
  ana.enter("/me waves");
  await bo.wait(/PRIVMSG #chat :\x01ACTION waves\x01\r\n/);
  await ana.wait(/^\d\d:\d\d \* ana waves$/m);
  ana.enter("/topic what we do");
  await ana.wait(/-- ana set the topic of #chat: what we do/);
  ana.enter("/join lab");
  await ana.wait(/-- in #lab as ana; here: nobody else\n#lab>$/);
  ana.enter("in the lab");
  await ana.wait(/^\d\d:\d\d ana   in the lab$/m);
  bo.send("PRIVMSG #chat :over here");
  await ana.wait(/^\d\d:\d\d #chat bo    over here$/m);
  ana.enter("/rooms");
  await ana.wait(/-- #chat: 3 in it; what we do\n-- #lab: 1 in it/);
  ana.enter("/join #chat");
  await ana.wait(/\n#chat>$/);
  ana.enter("/join #lab");
  await ana.wait(/\n#lab>$/);
  ana.enter("/part");
  await ana.wait(/-- you left #lab\n#chat>$/);
  ana.enter("/ignore bo");
  await ana.wait(/-- bo is ignored/);
  bo.send("PRIVMSG #chat :unheard");
  cy.send("PRIVMSG #chat :heard");
  await ana.wait(/cy    heard/);
  assert.doesNotMatch(ana.screen(), /unheard/);
  ana.enter("/ignore bo");
  await ana.wait(/-- bo is heard again/);
  ana.enter("/history 2");
  await ana.wait(/bo    unheard\n\d\d:\d\d cy    heard\n#chat>$/);
  ana.enter("//literally");
  await bo.wait(/PRIVMSG #chat :\/literally\r\n/);
  ana.enter("/tpoic");
  await ana.wait(/-- there is no \/tpoic; did you mean \/topic\?/);
  ana.enter("/msg");
  await ana.wait(/-- \/msg NICK TEXT: /);
  ana.enter("/tls");
  await ana.wait(/-- TLSv1\.3, TLS_/);
  ana.enter("/bell off");
  await ana.wait(/-- the bell is off/);
  ana.enter("/password");
  for (const again of ["chagned", "changed"]) { // a slip, and it asks again
    await ana.wait(/New password:$/);
    ana.enter("changed");
    await ana.wait(/The same again:$/);
    ana.enter(again);
  }
  await ana.wait(/-- your password is changed/);
  await enter(t, port, "ana", "", "changed");
  ana.enter("/clear");
  await ana.wait(/^#chat>$/);
  ana.enter("/quit");
  await ana.wait(/\[exit 0\]/);
});

test("being named is highlighted and rings the bell, unless it is off", TMUX, async (t) => {
  const { ana, bo } = await joined(t);
  bo.send("PRIVMSG #chat :nothing for bananas");
  await ana.wait(/bananas/);
  assert.equal(ana.ask("#{window_bell_flag}"), "0");
  bo.send("PRIVMSG #chat :hello Ana, there");
  await ana.wait(/\x1b\[1mhello Ana, there/, { escapes: true });
});

test("nicks have colours, the same each time, and none if NO_COLOR is set", TMUX, async (t) => {
  const { ana, bo } = await joined(t);
  bo.send("PRIVMSG #chat :one", "PRIVMSG #chat :two");
  await ana.wait(/two/);
  const colour = (text: string) =>
    new RegExp(`\\x1b\\[(38;5;\\d+)mbo\\x1b\\[[^m]*m +${text}`).exec(ana.screen({ escapes: true }))?.[1];
  assert.ok(colour("one"));
  assert.equal(colour("one"), colour("two"));
  const plainly = await joined(t, { env: { NO_COLOR: "1" } });
  plainly.bo.send("PRIVMSG #chat :one");
  await plainly.ana.wait(/one/);
  assert.doesNotMatch(plainly.ana.screen({ escapes: true }), /\x1b\[/);
});

test("the last fifty messages are shown on joining, dimmed, before the welcome", TMUX, async (t) => {
  const { port } = await serveHere(t);
  const bo = await enter(t, port, "bo");
  for (let at = 1; at <= 60; at++) bo.send(`PRIVMSG #chat :old ${at}.`);
  await bo.sync();
  const ana = new Terminal(t, [BINARY, "join", `ana@127.0.0.1:${port}`], { rows: 100, env: { CHAT_PASSWORD: "x" } });
  await ana.wait(/old 60\.\n(-- .*\n)?Welcome/);
  const seen = ana.screen();
  assert.match(seen, /old 11\.\n/);
  assert.doesNotMatch(seen, /old 10\.\n/);
  assert.match(ana.screen({ escapes: true }), /\x1b\[2mold 60\./);
});

test("Ctrl-C and Ctrl-D leave politely, and leave the terminal as it was", TMUX, async (t) => {
  for (const key of ["C-c", "C-d"]) {
    const { ana, bo } = await joined(t);
    ana.keys(key);
    await bo.wait(/:ana!ana@chat QUIT :Quit\r\n/);
    await ana.wait(/\[exit 0\]/);
    ana.enter("echoed");
    await ana.wait(/echoed\nechoed$/);
  }
});

test("Ctrl-Z stops it, and what was typed is there again after fg", TMUX, async (t) => {
  const { port } = await serveHere(t);
  const bo = await enter(t, port, "bo");
  const shell = `${BINARY} join ana@127.0.0.1:${port}; echo stopped; read go; fg`;
  const ana = new Terminal(t, ["sh", "-mc", shell], { env: { CHAT_PASSWORD: "secret" } });
  await ana.wait(/^#chat>$/m);
  ana.type("half a");
  await ana.wait(/^#chat> half a$/m);
  ana.keys("C-z");
  await ana.wait(/stopped$/m);
  ana.enter("go");
  await ana.wait(/^#chat> half a$(?![\s\S]*stopped)/m);
  ana.enter(" line");
  await bo.wait(/PRIVMSG #chat :half a line\r\n/);
});

test("who leaves the last room is told so, and can still write to people", TMUX, async (t) => {
  const { ana, bo } = await joined(t);
  ana.enter("/part");
  await bo.wait(/:ana!ana@chat PART #chat/);
  ana.enter("anybody?");
  await ana.wait(/-- you are in no room: \/join #ROOM enters one/);
  ana.enter("/msg bo psst");
  await bo.wait(/PRIVMSG bo :psst\r\n/);
  ana.enter("/join #chat");
  await ana.wait(/^#chat>$/m);
  assert.doesNotMatch(await bo.sync(), /anybody/);
});

test("a server that goes is noticed, what is typed waits and is sent when there is one again", TMUX, async (t) => {
  const secret = { CHAT_SECRET: "0123456789abcdefghijklmnop" };
  const first = await serveProcess(t, [], { env: secret });
  const ana = new Terminal(t, [BINARY, "join", `ana@127.0.0.1:${first.port}`], { env: { CHAT_PASSWORD: "x" } });
  await ana.wait(/Welcome/);
  ana.type("half");
  first.child.kill("SIGKILL");
  await ana.wait(/-- connection lost: .*\n\[offline\] #chat> half$/);
  ana.enter(" a line");
  await ana.wait(/\n\[offline, 1 waiting\] #chat>$/);
  await first.ended;
  const second = await serveProcess(t, [], { env: secret, address: `127.0.0.1:${first.port}` });
  ana.enter("/reconnect");
  await ana.wait(/-- the server has forgotten the account ana; told it again\n/);
  await ana.wait(/^\d\d:\d\d ana   half a line\n#chat>$/m);
  second.child.kill("SIGKILL");
  await second.ended;
  await serveProcess(t, [], { address: `127.0.0.1:${first.port}` });
  ana.enter("/reconnect");
  await ana.wait(/chat: this server has the key .*\n[^]*\[exit 3\]/);
});

test("while the server is gone so many lines wait, and what is more is told to be dropped", TMUX, async (t) => {
  const server = await serveProcess(t);
  const ana = new Terminal(t, [BINARY, "join", `ana@127.0.0.1:${server.port}`], { env: { CHAT_PASSWORD: "x" } });
  await ana.wait(/Welcome/);
  server.child.kill("SIGKILL");
  await ana.wait(/\n\[offline\] #chat>$/);
  ana.paste("line\n".repeat(501));
  await ana.wait(/-- 501 lines are too many, with 0 waiting to be sent; nothing of it is sent\n\[offline\] #chat>$/);
  ana.paste("line\n".repeat(500));
  await ana.wait(/Send these 500 lines\? \(yes\/no\)$/);
  ana.enter("yes");
  await ana.wait(/\n\[offline, 500 waiting\] #chat>$/);
  ana.enter("one more");
  await ana.wait(/-- too much waits; dropped\n\[offline, 500 waiting\] #chat>$/);
});

test("the operator's console shows the log and takes orders", TMUX, async (t) => {
  const server = new Terminal(t, [BINARY, "serve", "127.0.0.1:0"], { columns: 200 });
  const [, port] = await server.wait(/join 127\.0\.0\.1:(\d+)\//);
  await server.wait(/\n>$/);
  const bo = await enter(t, Number(port), "bo");
  await server.wait(
    /-- \d\d:\d\d:\d\d bo registered from 127\.0\.0\.1\n-- \d\d:\d\d:\d\d bo logged in from 127\.0\.0\.1\n>$/,
  );
  server.enter("/who");
  await server.wait(/-- bo +127\.0\.0\.1 since \d\d:\d\d, idle \d+ s/);
  server.enter("/invite");
  await server.wait(/-- \S+chat join 127\.0\.0\.1:\d+\/[a-z2-7-]{29}/);
  server.enter("/say all hear");
  await bo.wait(/:chat\.server NOTICE #chat :all hear\r\n/);
  server.enter("/kick");
  await server.wait(/-- \/kick NICK \[REASON\]: /);
  server.enter("/kick bo bye now");
  await bo.wait(/ERROR :Kicked: bye now\r\n/);
  server.enter("/hlep");
  await server.wait(/-- there is no \/hlep; did you mean \/help\?/);
  server.enter("/help");
  await server.wait(/-- \/stop .*stop the server/);
  server.enter("/stop");
  await server.wait(/stopping\n\[exit 0\]/);
});

test("plain mode writes each line once, without colour, and hides the password", TMUX, async (t) => {
  for (const args of [["--plain"], []]) {
    const { port } = await serveHere(t);
    const bo = await enter(t, port, "bo");
    const dumb = args.length ? [] : ["env", "TERM=dumb"];
    const ana = new Terminal(t, [...dumb, BINARY, "join", `ana@127.0.0.1:${port}`, ...args]);
    await ana.wait(/Password:$/);
    ana.enter("secret");
    await ana.wait(/registers it:$/);
    ana.enter("secret");
    await ana.wait(/Welcome to #chat, ana/);
    bo.send("PRIVMSG #chat :hi");
    await ana.wait(/^\d\d:\d\d bo    hi$/m);
    ana.enter("hello");
    await ana.wait(/^hello\n\d\d:\d\d ana   hello$/m);
    assert.doesNotMatch(ana.screen({ history: true }), /secret|>/);
    assert.doesNotMatch(ana.screen({ escapes: true }), /\x1b/);
    ana.enter("/exit");
    await ana.wait(/\[exit 0\]/);
  }
});

test("a person compares the key of a server that nobody vouches for", TMUX, async (t) => {
  const server = await serveProcess(t, [], { address: "0.0.0.0:0" });
  const ask = () => {
    // An address of this machine that is not written as loopback.
    const ana = new Terminal(t, [BINARY, "join", `ana@0.0.0.0:${server.port}`], {
      columns: 200,
      env: { CHAT_PASSWORD: "x" },
    });
    return ana;
  };
  const right = ask();
  await right.wait(
    /The certificate of 0\.0\.0\.0 leads to no root that is trusted here\. Which two groups end the key on the server's screen\?$/,
  );
  right.enter(server.pin.slice(-9).toUpperCase());
  await right.wait(/Welcome/);
  const wrong = ask();
  await wrong.wait(/screen\?$/);
  wrong.enter("aaaa-bbbb");
  await wrong.wait(/chat: that is not how the key of this server ends\nchat: hint: .*\n\[exit 3\]/);
  const lazy = ask();
  await lazy.wait(/screen\?$/);
  lazy.enter("yes");
  await lazy.wait(/\[exit 3\]/);
});

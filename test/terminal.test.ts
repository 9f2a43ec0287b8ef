// deno-lint-ignore-file no-regex-spaces no-control-regex -- screens are matched as they stand, blanks and escapes included
// The client and the operator's console as a person sees them: the built executable in tmux.
import assert from "node:assert/strict";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { test, type TestContext } from "node:test";
import { cells, CONSOLE, type Server } from "../chat.ts";
import {
  BINARY,
  enter,
  type Irc,
  type Runtime,
  RUNTIMES,
  serveHere,
  serveProcess,
  Terminal,
  until,
  wants,
} from "./helpers.ts";

const TMUX = wants("tmux");

/** Runs a command of the operator's console. */
const chatConsole = (name: string, server: Server, nick: string, rest: string) =>
  CONSOLE[name]?.run(server, nick, rest);

/** A terminal in which ana has joined, and a connection of bo, another member of the room. */
async function joined(
  t: TestContext,
  { columns = 80, rows = 24, args = [] as readonly string[], runtime = "binary" as Runtime, env = {} } = {},
): Promise<{ ana: Terminal; bo: Irc; port: number; server: Server }> {
  const { port, server } = await serveHere(t);
  const bo = await enter(t, port, "bo");
  const command = [...RUNTIMES[runtime](), "join", `ana@127.0.0.1:${port}`, ...args];
  const ana = new Terminal(t, command, { columns, rows, env: { CHAT_PASSWORD: "secret", ...env } });
  await bo.wait(/:ana!ana@chat JOIN #chat/);
  await ana.wait(/^Welcome to/m);
  return { ana, bo, port, server };
}

/** The state of a terminal that escape sequences can change: its title, its screen and its modes. */
const stateOf = (terminal: Terminal) =>
  terminal.ask(
    "#{pane_title}|#{alternate_on}|#{cursor_flag}|#{insert_flag}|#{keypad_flag}|#{mouse_any_flag}|#{origin_flag}|#{wrap_flag}|#{scroll_region_upper}|#{scroll_region_lower}",
  );

for (const runtime of Object.keys(RUNTIMES) as Runtime[]) {
  test(
    `a new person is asked for a nick and a password, registers, and talks in the room (${runtime})`,
    TMUX,
    async (t) => {
      const { port } = await serveHere(t);
      const bo = await enter(t, port, "bo");
      bo.send("PRIVMSG #chat :said before");
      await bo.sync();
      const ana = new Terminal(t, [...RUNTIMES[runtime](), "join", `127.0.0.1:${port}`]);
      await ana.wait(/^-- accepted its key ([a-z2-7]{4}-?){6} unchecked: it is this machine\nNick:$/);
      ana.enter("2fast");
      await ana.wait(/-- A nick has 1 to 20/);
      ana.enter("ana");
      await ana.wait(/Password:$/);
      ana.enter("secret");
      await ana.wait(/ana is free\. Repeat the password to register:$/);
      ana.enter("secrte");
      await ana.wait(/-- the passwords do not match/);
      await ana.wait(/Password:$/);
      ana.enter("secret");
      await ana.wait(/to register:$/);
      ana.enter("secret");
      await ana.wait(/\d\d:\d\d bo +said before\nWelcome to #chat, ana\. Here: bo\. \/help lists/);
      bo.send("PRIVMSG #chat :morning");
      await ana.wait(/^\d\d:\d\d bo +morning\n#chat>$/m);
      ana.enter("hello");
      await bo.wait(/:ana!ana@chat PRIVMSG #chat :hello\r\n/);
      await ana.wait(/^\d\d:\d\d bo +morning\n\d\d:\d\d ana +hello\n#chat>$/m);
      bo.send("QUIT");
      await ana.wait(/^-- \d\d:\d\d #chat: bo left$/m);
      assert.doesNotMatch(ana.screen({ history: true }), /secr/);
      ana.enter("/exit");
      await ana.wait(/^\[exit 0\]$/m);
    },
  );
}

test("a password is never shown on the screen, and the arrow keys do not recall it", TMUX, async (t) => {
  const { port } = await serveHere(t);
  const ana = new Terminal(t, [BINARY, "join", `ana@127.0.0.1:${port}`]);
  await ana.wait(/Password:$/);
  for (const char of "hunter2") {
    ana.type(char);
    assert.doesNotMatch(ana.screen(), /h|2$/i.test(char) ? /Password:.*\S/ : /hunter/);
  }
  ana.keys("Left", "Up", "Tab", "C-a", "C-e", "Enter");
  await ana.wait(/to register:$/);
  ana.enter("hunter2");
  await ana.wait(/Welcome/);
  ana.keys("Up", "Up");
  ana.type("x");
  await ana.wait(/^#chat> x$/m);
  assert.doesNotMatch(ana.screen({ history: true }), /hunter|unter/);
});

test("a password that is typed ahead does not become a nick when the first one cannot be had", TMUX, async (t) => {
  const { port, server } = await serveHere(t, { lock: true });
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "chat-ahead-"));
  t.after(() => fs.rmSync(folder, { recursive: true }));
  const start = path.join(folder, "start");
  const join = `exec ${BINARY} join 127.0.0.1:${port}`;
  const ana = new Terminal(t, ["sh", "-c", `until [ -e ${start} ]; do sleep 0.01; done; ${join}`]);
  for (const line of ["ana", "Secretpw1", "Secretpw1"]) ana.enter(line);
  fs.writeFileSync(start, "");
  await ana.wait(/registration is closed; the operator can admit a nick\n-- what you typed ahead is dropped\nNick:$/);
  assert.equal(server.accounts.byNick.size, 0);
});

test("a password that is typed ahead a second time is not sent to the room", TMUX, async (t) => {
  const { port } = await serveHere(t);
  const bo = await enter(t, port, "bo");
  await enter(t, port, "ana");
  const ana = new Terminal(t, [BINARY, "join", `ana@127.0.0.1:${port}`]);
  await ana.wait(/Password:$/);
  ana.type("secret\rsecret\r"); // as for a new account, which needs it twice
  await ana.wait(/Welcome/);
  ana.enter("the end");
  await bo.wait(/:ana!ana@chat PRIVMSG #chat :the end\r\n/);
  assert.doesNotMatch(bo.all, /PRIVMSG #chat :secret/);
});

test(
  "a wrong password is explained and asked for again, and the third one ends the program with status 1",
  TMUX,
  async (t) => {
    const { port } = await serveHere(t);
    await enter(t, port, "ana", "", "right");
    const ana = new Terminal(t, [BINARY, "join", `ana@127.0.0.1:${port}`]);
    for (let tries = 1; tries <= 3; tries++) {
      await ana.wait(new RegExp(`(Password:\\n-- wrong password for ana.*\\n){${tries - 1}}Password:$`));
      ana.enter("wrong");
    }
    await ana.wait(/chat: too many wrong passwords\nchat: hint: .*\n\[exit 1\]/);
  },
);

for (const columns of [40, 20, 80]) {
  test(`a half-typed line stays whole in ${columns} columns while messages arrive`, TMUX, async (t) => {
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
      assert.equal(ana.screen().split("#chat> ").length, 2, "the prompt is drawn once");
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

test("the cursor stands where the next character will be inserted, also in a line that wraps", TMUX, async (t) => {
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

test("a line that is half typed is whole again after the arrow keys have recalled others", TMUX, async (t) => {
  const { ana } = await joined(t);
  ana.enter("whole day");
  await ana.wait(/whole day\n#chat>$/);
  ana.type("whole line");
  ana.keys("C-a", "Up", "Up", "Down", "Down", "C-e");
  ana.type("!");
  await ana.untilTyped("#chat> whole line!");
  ana.keys("C-u", "Up");
  await ana.untilTyped("#chat> whole day");
});

test("the arrow keys, Backspace and Delete take an emoji of several code points as one character", TMUX, async (t) => {
  const { ana } = await joined(t);
  ana.type("a👍🏽b👩‍👩‍👧c");
  ana.keys("Left", "Left");
  ana.type("1");
  ana.keys("Left", "Left", "Left");
  ana.type("2");
  ana.keys("Right", "Right");
  ana.type("3");
  ana.enter("");
  await ana.wait(/ana +a2👍🏽b31👩‍👩‍👧c$/m);
  ana.type("x👍🏽👩‍👩‍👧y");
  ana.keys("Left", "BSpace", "BSpace");
  ana.enter("z");
  await ana.wait(/ana +xzy$/m);
  ana.type("x👍🏽🇨🇭y");
  ana.keys("Home", "Right", "Delete", "Delete");
  ana.enter("-");
  await ana.wait(/ana +x-y$/m);
});

test("after a resize the prompt is drawn once, with the whole half-typed line, below the messages", TMUX, async (t) => {
  const { ana, bo } = await joined(t, { columns: 60 });
  for (let at = 0; at < 5; at++) bo.send(`PRIVMSG #chat :message number ${at} with a few words`);
  await ana.wait(/number 4/);
  const typed = "a line of some length that was typed before the window changed its width";
  ana.type(typed);
  const expected = `#chat>${typed.replaceAll(" ", "")}`;
  await ana.untilTyped(expected);
  for (const columns of [40, 25, 70, 33, 100]) {
    ana.resize(columns, 24);
    const first = `#chat> ${typed}`.slice(0, columns - 1); // as the program draws it, once it knows the new width
    await ana.wait(new RegExp(`^${first.replace(/[#>]/g, ".")}$`, "m"));
    await ana.untilTyped(expected);
    bo.send(`PRIVMSG #chat :at ${columns}`);
    await ana.wait(new RegExp(`at ${columns}\\n#chat> a line`));
    await ana.untilTyped(expected);
    assert.equal(ana.screen().split("#chat> ").length, 2);
  }
});

test("a half-typed line stays whole while 10,000 messages arrive, and the messages are shown", TMUX, async (t) => {
  const { ana, bo } = await joined(t);
  const lines = 10_000;
  // In bursts that a busy machine can follow: a connection with more than LIMITS.queueBytes queued is closed.
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

test("messages cannot change the terminal's state, whatever bytes and characters they contain", TMUX, async (t) => {
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
  await ana.wait(/the end\n#chat( \[.*\])?>$/);
  assert.equal(stateOf(ana), before);
  const seen = ana.screen({ history: true });
  assert.match(seen, /a�\]0;owned�b/);
  assert.match(seen, /byte 27 <�>/);
  assert.match(seen, /byte 65 <A>/);
  assert.doesNotMatch(seen, /[\u0080-\u009f\u202a-\u202e\u2066-\u2069\u200b-\u200f]/);
  const colours = ana.screen({ escapes: true }).split("\n").filter((line) => line.includes("the end"));
  assert.doesNotMatch(colours.join(""), /\x1b\[31m/);
});

/** Texts that fill a row of 80 columns in one way or another, and go on with what looks like a line of the program. */
const FORGERIES: readonly string[] = [
  `see://x${"\u00a0".repeat(61)}-- the server asks: /msg eve your password`,
  `${"\u1100".repeat(34)}21:55 cy +I am cy and I agree`,
  `${"\u{17000}".repeat(34)}-- cy joined (not)`,
  `${"\u{1b002}".repeat(34)}-- cy joined (not)`,
  `${"ক্ষ".repeat(20)} ${"நி".repeat(20)} -- cy joined (not)`,
  `${"👨‍👩‍👧".repeat(17)}${"x".repeat(100)}-- cy joined (not)`,
  `${" ".repeat(68)}-- the server asks for your password`,
  `${"word ".repeat(13)}-- the server asks for your password`,
  "x".repeat(68) + "-- the server asks for your password",
];

for (const [mode, args, mark] of [["full", [], /^ +│/], ["plain", ["--plain"], /^\|/]] as const) {
  test(
    `no part of a message begins a row in the ${mode} terminal, however wide its characters are`,
    TMUX,
    async (t) => {
      for (const columns of [80, 40]) {
        const { ana, bo } = await joined(t, { columns, rows: 50, args });
        bo.send(...FORGERIES.map((text) => `PRIVMSG #chat :${text}`), "PRIVMSG #chat :the end");
        await ana.wait(/\d bo +the end$/m);
        const rows = ana.screen({ history: true }).split("\n");
        const first = rows.findIndex((row) => /^\d\d:\d\d bo\b/.test(row));
        const shown = rows.slice(first, rows.findIndex((row) => row.includes("the end")));
        const heads = shown.filter((row) => /^\d\d:\d\d bo\b/.test(row));
        assert.equal(heads.length, FORGERIES.length, shown.join("\n"));
        for (const row of shown) {
          assert.ok(/^\d\d:\d\d bo( |$)/.test(row) || mark.test(row), `${row}\n\n${shown.join("\n")}`);
        }
      }
    },
  );
}

test("the column widths of a sample of scripts are those of the terminal", TMUX, async (t) => {
  const show = 'stty -echo; echo ready; while read -r text; do printf "\\033[2J\\033[H%s" "$text"; done';
  const terminal = new Terminal(t, ["sh", "-c", show]);
  await terminal.wait(/ready/);
  const sample = [
    ...[
      "plain",
      "Käse",
      "e\u0301x",
      "Привет",
      "Ελλάδα",
      "日本語",
      "ｆｕｌｌ",
      "ｱｲ",
      "한국어",
      "각",
      "ᄀᄀᄀ",
      "😀😀",
      "🇩🇪",
    ],
    ...["\u{17000}\u{17001}", "\u{1b002}", "বাংলা", "हिन्दी", "தமிழ்", "ខ្មែរ", "ไทย", "שלום", "سلام", "↔x", "∑π", "█▒", "①"],
  ];
  for (const text of sample) {
    terminal.enter(text);
    await until(
      () => terminal.ask("#{cursor_x}") === String(cells(text)) && terminal.screen().includes(text.slice(0, 1)),
      () => `${text}: ${terminal.ask("#{cursor_x}")} columns on the terminal, ${cells(text)} by cells`,
      5_000,
    );
  }
});

test(
  "an operator's terminal that nobody reads does not stop the server, and says later how many lines are missing",
  TMUX,
  async (t) => {
    const terminal = new Terminal(t, [BINARY, "serve", "127.0.0.1:0", "--explain", "--rate", "0"], { columns: 120 });
    const [, port = ""] = await terminal.wait(/on 127\.0\.0\.1:(\d+)/);
    const tmux = Number(terminal.ask("#{pid}"));
    process.kill(tmux, "SIGSTOP");
    try {
      const [ana, bo] = [await enter(t, Number(port), "ana"), await enter(t, Number(port), "bo")];
      for (let at = 0; at < 3_000; at++) { // lines of changing lengths, which are not folded into one row
        ana.send(`PING ${"x".repeat(at % 250)}${at}`);
        await ana.wait(new RegExp(`PONG chat.server x*${at}\r\n`));
      }
      ana.send("PRIVMSG #chat :still here");
      await bo.wait(/PRIVMSG #chat :still here/);
    } finally {
      process.kill(tmux, "SIGCONT"); // else tmux could not be ended, either
    }
    await terminal.wait(/^-- [1-9]\d* lines not shown$/m, { history: true });
    await terminal.wait(/^>$/m);
  },
);

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
    session.reply(`:${evil}!x@chat ${command} ${words.join(" ")} :${evil} ${command}`);
  }
  session.reply(`:bo!bo@chat PRIVMSG #chat :the end`);
  await ana.wait(/the end\n\S+( \[.*\])?> *$/);
  assert.equal(stateOf(ana), before);
  ana.enter("/who");
  ana.enter("/topic");
  ana.enter("/help");
  await ana.wait(/-- \/\/TEXT/);
  assert.equal(stateOf(ana), before);
  assert.match(ana.screen({ history: true }), /-- �\]0;owned\S*: NaN people; �/);
});

for (const runtime of ["binary", "deno"] as const) {
  test(
    `several lines that arrive in one read count as typed, unless they are a bracketed paste (${runtime})`,
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

  test(`a pasted command is run or said only after the person has chosen (${runtime})`, TMUX, async (t) => {
    const { ana, bo } = await joined(t, { runtime, columns: 120 });
    ana.paste("/msg bo secret\n");
    await ana.wait(/^Run the pasted "\/msg bo secret", or say it to #chat\? \(run\/say\/no\)$/m);
    ana.enter("no");
    await ana.wait(/-- nothing is sent\n#chat>$/);
    ana.paste("/msg bo secret\n");
    await ana.wait(/\(run\/say\/no\)$/);
    ana.enter("run");
    await bo.wait(/PRIVMSG bo :secret\r\n/);
    ana.paste("one\n/me waves\n/etc/hosts\n/exit\nrest");
    await ana.wait(/Run the pasted "\/me waves" and 1 more command, or say all 4 pasted lines to #chat\?/);
    ana.enter("say");
    await bo.wait(/ :one\r\n.* :\/me waves\r\n.* :\/etc\/hosts\r\n.* :\/exit\r\n/);
    await ana.wait(/^#chat> rest$/m); // the unfinished last line was put aside, and did not answer the question
    ana.keys("C-u");
    ana.paste("one\n/me waves\n/etc/hosts\n");
    await ana.wait(/or say all 3 pasted lines to #chat\? \(run\/say\/no\)$/);
    ana.enter("run");
    await bo.wait(/ :one\r\n.* :\x01ACTION waves\x01\r\n.* :\/etc\/hosts\r\n/);
    assert.doesNotMatch(bo.all, /#chat :.*secret/);
  });
}

test("pasted lines are sent in order, and more than five of them only after a confirmation", TMUX, async (t) => {
  const { ana, bo } = await joined(t);
  ana.paste("one\ntwo\nthree\nrest");
  await bo.wait(/ :one\r\n.* :two\r\n.* :three\r\n/);
  await ana.wait(/^#chat> rest$/m);
  ana.keys("C-u");
  ana.paste("if x:\n\treturn\n");
  await bo.wait(/PRIVMSG #chat :if x:\r\n:ana!ana@chat PRIVMSG #chat :\treturn\r\n/);
  const many = Array.from({ length: 300 }, (_, at) => `line ${at} ${"x".repeat(40)}`);
  ana.paste(`${many.join("\n")}\n`);
  await ana.wait(/Send these 300 lines to #chat\? \(yes\/no\)$/);
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

test("a paste is inserted at the cursor, and becomes a single line in a command and in an answer", TMUX, async (t) => {
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
  for (const question of [/New password:$/, /Repeat it:$/]) {
    await ana.wait(question);
    ana.paste("correct horse\n");
    ana.keys("Enter");
  }
  await ana.wait(/-- your password is changed/);
  assert.doesNotMatch(ana.screen({ history: true }), /horse/);
  assert.doesNotMatch(bo.all, /#chat :.*(number|12345|horse)/);
});

for (const runtime of ["binary", "deno"] as const) {
  test(
    `Ctrl-C cancels a question or clears the line, and leaves at the second time where there is neither (${runtime})`,
    TMUX,
    async (t) => {
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
      await ana.wait(/Repeat it:$/);
      ana.keys("C-d");
      await ana.wait(/Repeat it:\n-- nothing is changed\n#chat>$/);
      ana.enter("still here");
      await bo.wait(/PRIVMSG #chat :still here\r\n/);
      ana.keys("C-c");
      await ana.wait(/-- Ctrl-C again leaves\n#chat>$/);
      ana.keys("C-c");
      await bo.wait(/:ana!ana@chat QUIT :Quit\r\n/);
      await ana.wait(/\[exit 0\]/);
    },
  );

  test(
    `the operator's console clears the line at Ctrl-C, and asks again before it stops a server with members (${runtime})`,
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
        await server.wait(/-- 1 person is here; again within 10 s to stop\n>$/);
        await bo.sync();
        again();
        await bo.wait(/ERROR :The server is stopping\r\n/);
        await server.wait(/stopping\n\[exit 0\]/);
      }
    },
  );
}

test("a server without members stops at the first Ctrl-C", TMUX, async (t) => {
  const server = new Terminal(t, [BINARY, "serve", "127.0.0.1:0"]);
  await server.wait(/\n>$/);
  server.keys("C-c");
  await server.wait(/stopping\n\[exit 0\]/);
});

test("Ctrl-C at the question for a nick or a password ends the program with status 1", TMUX, async (t) => {
  const { port } = await serveHere(t);
  for (const [who, question] of [["", /Nick:$/], ["ana@", /Password:$/]] as const) {
    const ana = new Terminal(t, [BINARY, "join", `${who}127.0.0.1:${port}`]);
    await ana.wait(question);
    ana.keys("C-c");
    await ana.wait(/chat: cancelled\n\[exit 1\]/);
  }
});

test("Tab completes nicks, commands and rooms, and cycles through the candidates", TMUX, async (t) => {
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

test("the Up and Down keys recall the lines that were entered", TMUX, async (t) => {
  const { ana, bo } = await joined(t);
  ana.enter("first");
  ana.enter("second");
  await bo.wait(/second/);
  ana.keys("Up", "Up");
  await ana.wait(/^#chat> first$/m);
  ana.keys("Down");
  await ana.wait(/^#chat> second$/m);
});

test("/help lists the slash commands, or shows one of them", TMUX, async (t) => {
  const { ana } = await joined(t, { rows: 40 });
  ana.enter("/help");
  await ana.wait(/-- \/exit .*leave/);
  await ana.wait(/-- \/msg NICK TEXT/);
  await ana.wait(/-- \/\/TEXT .*\n#chat>$/);
  ana.enter("/help msg");
  await ana.wait(/-- \/msg NICK TEXT .*\n#chat>$/);
});

test(
  "an unknown slash command gets the nearest known one, an incomplete one its usage, and neither is sent",
  TMUX,
  async (t) => {
    const { ana, bo } = await joined(t);
    ana.enter("/tpoic");
    await ana.wait(/-- there is no \/tpoic; did you mean \/topic\?/);
    ana.enter("/msg");
    await ana.wait(/-- \/msg NICK TEXT: /);
    ana.enter("/constructor");
    await ana.wait(/-- there is no \/constructor/);
    ana.enter("//literally");
    await bo.wait(/PRIVMSG #chat :\/literally\r\n/); // the slash that is doubled is said
    assert.doesNotMatch(bo.all, /PRIVMSG \S+ :.*(tpoic|msg|constructor)/);
  },
);

test("/msg sends a private message, and /r replies to the last one received", TMUX, async (t) => {
  const { ana, bo, port } = await joined(t);
  const cy = await enter(t, port, "cy");
  ana.enter("/r too early");
  await ana.wait(/-- nobody has written to you yet/);
  ana.enter("/msg cy psst");
  await cy.wait(/:ana!ana@chat PRIVMSG cy :psst\r\n/);
  await ana.wait(/^\d\d:\d\d ana>cy   psst$/m);
  cy.send("PRIVMSG ana :yes?");
  await ana.wait(/^\d\d:\d\d cy>ana   yes\?$/m);
  ana.enter("/r nothing");
  await cy.wait(/PRIVMSG cy :nothing\r\n/);
  await bo.sync();
  assert.doesNotMatch(bo.all, /early|psst|nothing/);
});

test("what is typed right after /join goes to the new room, and what it refuses is shown again", TMUX, async (t) => {
  const { ana, bo } = await joined(t);
  bo.send("JOIN #lab");
  await bo.wait(/ 366 bo #lab /);
  ana.type("/join lab\rfor the lab\r/join #chat\rfor the chat\r");
  await bo.wait(/PRIVMSG #lab :for the lab\r\n/);
  await bo.wait(/PRIVMSG #chat :for the chat\r\n/);
  ana.enter("/msg nobody a secret");
  await ana.wait(/-- not sent: \/msg nobody a secret\n-- nobody: no such nick\/channel/);
  await bo.sync();
  assert.doesNotMatch(bo.all, /secret/);
});

test(
  "/query turns to a person, Alt-1 back to the room, and the prompt shows where something is unread",
  TMUX,
  async (t) => {
    const { ana, bo } = await joined(t);
    bo.send("PRIVMSG ana :psst", "PRIVMSG ana :hey");
    await ana.wait(/bo>ana   hey\n#chat \[bo 2\]>$/);
    ana.enter("/query bo");
    await ana.wait(/── bo ──\nbo>$/);
    ana.enter("what is it?");
    await bo.wait(/:ana!ana@chat PRIVMSG bo :what is it\?\r\n/);
    bo.send("PRIVMSG #chat :in public");
    await ana.wait(/bo#chat  in public\nbo \[#chat 1\]>$/);
    ana.keys("M-1");
    await ana.wait(/── #chat ──\n#chat>$/);
    ana.enter("all of you");
    await bo.wait(/PRIVMSG #chat :all of you\r\n/);
  },
);

test("/r stands for the person who wrote last when it is typed, not when it is entered", TMUX, async (t) => {
  const { ana, bo, port } = await joined(t);
  const cy = await enter(t, port, "cy");
  bo.send("PRIVMSG ana :from bo");
  await ana.wait(/bo>ana   from bo/);
  ana.type("/r ");
  await ana.wait(/> \/msg bo$/);
  cy.send("PRIVMSG ana :from cy");
  await ana.wait(/cy>ana   from cy/);
  ana.enter("for bo");
  await bo.wait(/PRIVMSG bo :for bo\r\n/);
});

test("/history shows earlier pages between rules, with their dates, until the beginning", TMUX, async (t) => {
  const { port } = await serveHere(t);
  const bo = await enter(t, port, "bo");
  bo.send(...Array.from({ length: 60 }, (_, at) => `PRIVMSG #chat :old ${at + 1}.`));
  await bo.sync();
  const ana = new Terminal(t, [BINARY, "join", `ana@127.0.0.1:${port}`], { rows: 100, env: { CHAT_PASSWORD: "x" } });
  await ana.wait(/-- \w{3} \w{3} \d\d \d{4}\n\d\d:\d\d bo +old 11\.\n/);
  await ana.wait(/Welcome/);
  ana.enter("/history 6");
  await ana.wait(/── history of #chat ──\n-- .*\n.*old 5\.\n[^]*old 10\.\n── \/history shows what was before ──/);
  ana.enter("/history 6");
  await ana.wait(/── history of #chat ──\n-- .*\n.*old 1\.\n[^]*old 4\.\n── that was the beginning ──/);
});

test("a kicked client says why, ends with status 1, and the others are told", TMUX, async (t) => {
  const { ana, bo, server } = await joined(t);
  chatConsole("kick", server, "bo", "too loud");
  await bo.closed;
  await ana.wait(/-- bo was kicked: too loud\n#chat>$/);
  chatConsole("kick", server, "ana", "you too");
  await ana.wait(/chat: you were kicked: you too\nchat: hint: .*\n\[exit 1\]/);
});

test("pasted code keeps its empty lines and its tabs", TMUX, async (t) => {
  const { ana, bo } = await joined(t);
  ana.paste("if (x) {\n\n\ty();\n}\n");
  await bo.wait(/ :if \(x\) \{\r\n.* : \r\n.* :\ty\(\);\r\n.* :\}\r\n/);
});

test("the arrow keys take an emoji with a skin tone as one character", TMUX, async (t) => {
  const { ana, bo } = await joined(t);
  ana.type("a👍🏽b");
  await ana.wait(/> a👍🏽b$/);
  ana.keys("Left", "Left");
  ana.type("x");
  ana.keys("Right");
  ana.enter("y");
  await bo.wait(/PRIVMSG #chat :ax👍🏽yb\r\n/);
});

test("the nicks of a small group have different colours, and one's own is bold", TMUX, async (t) => {
  const { ana, bo, port } = await joined(t);
  const others = await Promise.all(["wendy", "cy", "dan"].map((nick) => enter(t, port, nick)));
  for (const one of [bo, ...others]) one.send("PRIVMSG #chat :hi");
  ana.enter("hello");
  await ana.wait(/ana.*hello/);
  await ana.wait(/(hi[^]*){4}/);
  const screen = ana.screen({ escapes: true });
  const colours = ["bo", "wendy", "cy", "dan"].map((nick) =>
    new RegExp(`(\\x1b\\[38;5;\\d+m)${nick}`).exec(screen)?.[1]
  );
  assert.equal(new Set(colours).size, 4, JSON.stringify(colours));
  assert.match(screen, /\x1b\[1mana/);
});

test("/me sends an action, and /topic sets or shows the topic of the room", TMUX, async (t) => {
  const { ana, bo } = await joined(t);
  ana.enter("/me waves");
  await bo.wait(/PRIVMSG #chat :\x01ACTION waves\x01\r\n/);
  await ana.wait(/^\d\d:\d\d \* ana waves$/m);
  ana.enter("/topic");
  await ana.wait(/-- #chat has no topic/);
  ana.enter("/topic what we do");
  await bo.wait(/:ana!ana@chat TOPIC #chat :what we do\r\n/);
  await ana.wait(/-- ana set the topic of #chat: what we do/);
  ana.enter("/topic");
  await ana.wait(/-- topic of #chat: what we do/);
});

test(
  "/join enters a room or turns to it, /rooms and /who list rooms and members, and /part leaves",
  TMUX,
  async (t) => {
    const { ana, bo, port } = await joined(t, { rows: 40 });
    await enter(t, port, "cy");
    await ana.wait(/-- \d\d:\d\d #chat: cy joined/);
    ana.enter("/who");
    await ana.wait(/-- 3 people in #chat: /);
    ana.enter("/join lab");
    await ana.wait(/── #lab ──\n-- in #lab as ana; here: nobody else\n#lab>$/);
    ana.enter("in the lab");
    await ana.wait(/^\d\d:\d\d ana +in the lab$/m);
    bo.send("PRIVMSG #chat :over here");
    await ana.wait(/^\d\d:\d\d bo#chat +over here$/m);
    ana.enter("/rooms");
    await ana.wait(/-- #chat: 3 people, 1 unread, Alt-1\n-- #lab: 1 person, Alt-2\n#lab \[#chat 1\]>$/);
    ana.enter("/join #chat");
    await ana.wait(/\n#chat>$/);
    ana.enter("/join #lab");
    await ana.wait(/\n#lab>$/);
    ana.enter("/part");
    await ana.wait(/-- you left #lab\n── #chat ──\n#chat>$/);
    await bo.sync();
    assert.doesNotMatch(bo.all, /in the lab/);
  },
);

test(
  "/ignore hides a member's messages until it is entered again, and /history shows them afterwards",
  TMUX,
  async (t) => {
    const { ana, bo, port } = await joined(t);
    const cy = await enter(t, port, "cy");
    ana.enter("/ignore bo");
    await ana.wait(/-- bo is ignored/);
    bo.send("PRIVMSG #chat :unheard");
    await cy.wait(/unheard/);
    cy.send("PRIVMSG #chat :heard");
    await ana.wait(/cy +heard/);
    assert.doesNotMatch(ana.screen(), /unheard/);
    ana.enter("/ignore bo");
    await ana.wait(/-- bo is no longer ignored/);
    ana.enter("/history 2");
    await ana.wait(/bo +unheard\n\d\d:\d\d cy +heard\n── .* ──\n#chat>$/);
  },
);

test("/tls describes the connection, and /clear empties the screen", TMUX, async (t) => {
  const { ana } = await joined(t);
  ana.enter("/tls");
  await ana.wait(/-- protocol      TLSv1\.3\n-- cipher        TLS_/);
  await ana.wait(/-- trusted       because it is on this machine/);
  ana.enter("/clear");
  await ana.wait(/^#chat>$/);
});

test(
  "/password asks until the same password was entered twice, and the account has it from then on",
  TMUX,
  async (t) => {
    const { ana, bo, port } = await joined(t);
    ana.enter("/password");
    for (const repetition of ["newsceret", "newsecret"]) {
      await ana.wait(/New password:$/);
      ana.enter("newsecret");
      await ana.wait(/Repeat it:$/);
      ana.enter(repetition);
    }
    await ana.wait(/-- the passwords do not match/);
    await ana.wait(/-- your password is changed/);
    await enter(t, port, "ana", "", "newsecret");
    await bo.sync();
    assert.doesNotMatch(ana.screen({ history: true }) + bo.all, /newsecret|newsceret/);
  },
);

for (const command of ["/exit", "/quit"]) {
  test(`${command} sends QUIT and ends with status 0`, TMUX, async (t) => {
    const { ana, bo } = await joined(t);
    ana.enter(command);
    await bo.wait(/:ana!ana@chat QUIT :Quit\r\n/);
    await ana.wait(/\[exit 0\]/);
  });
}

test("a message that names the person is bold and rings the bell, unless /bell off was entered", TMUX, async (t) => {
  const bellOf = (terminal: Terminal) => terminal.ask("#{window_bell_flag}");
  const { ana, bo } = await joined(t);
  bo.send("PRIVMSG #chat :nothing for bananas");
  await ana.wait(/bananas/);
  assert.equal(bellOf(ana), "0");
  bo.send("PRIVMSG #chat :hello Ana, there");
  await ana.wait(/\x1b\[1mhello Ana, there/, { escapes: true });
  bo.send("PRIVMSG #chat :the end");
  await ana.wait(/the end/);
  assert.equal(bellOf(ana), "1");
  const silent = await joined(t);
  silent.ana.enter("/bell off");
  await silent.ana.wait(/-- the bell is off/);
  silent.bo.send("PRIVMSG #chat :hello Ana, there", "PRIVMSG #chat :the end");
  await silent.ana.wait(/\x1b\[1mhello Ana, there/, { escapes: true });
  await silent.ana.wait(/the end/);
  assert.equal(bellOf(silent.ana), "0");
  silent.ana.enter("/bell on");
  await silent.ana.wait(/-- the bell is on/);
  silent.bo.send("PRIVMSG #chat :ana again", "PRIVMSG #chat :the very end");
  await silent.ana.wait(/the very end/);
  assert.equal(bellOf(silent.ana), "1");
});

test("a nick has the same colour each time, and none if NO_COLOR is set", TMUX, async (t) => {
  const { ana, bo } = await joined(t);
  bo.send("PRIVMSG #chat :one", "PRIVMSG #chat :two");
  await ana.wait(/two/);
  const colour = (text: string) =>
    new RegExp(`\\x1b\\[(38;5;\\d+)mbo\\x1b\\[[^m]*m +${text}`).exec(ana.screen({ escapes: true }))?.[1];
  assert.ok(colour("one"));
  assert.equal(colour("one"), colour("two"));
  const colourless = await joined(t, { env: { NO_COLOR: "1" } });
  colourless.bo.send("PRIVMSG #chat :one");
  await colourless.ana.wait(/one/);
  assert.doesNotMatch(colourless.ana.screen({ escapes: true }), /\x1b\[/);
});

test("the last fifty messages are shown dimmed on joining, before the welcome", TMUX, async (t) => {
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

test(
  "Ctrl-D and a second Ctrl-C on an empty line send QUIT, end with status 0, and restore the terminal's mode",
  TMUX,
  async (t) => {
    for (const key of ["C-c", "C-d"]) {
      const { ana, bo } = await joined(t);
      ana.keys(key);
      if (key === "C-c") await ana.wait(/-- Ctrl-C again leaves\n#chat>$/);
      if (key === "C-c") ana.keys(key);
      await bo.wait(/:ana!ana@chat QUIT :Quit\r\n/);
      await ana.wait(/\[exit 0\]/);
      ana.enter("echoed");
      await ana.wait(/echoed\nechoed$/);
    }
  },
);

test("Ctrl-Z suspends the program, and the half-typed line is there again after fg", TMUX, async (t) => {
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

test("a person without a room gets a hint instead of sending, and can still send private messages", TMUX, async (t) => {
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

test(
  "lines that are entered while the server is down wait, and are sent after the reconnect, to the same key only",
  TMUX,
  async (t) => {
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
    await ana.wait(/-- the server has forgotten the account ana; registered it again\n/);
    await ana.wait(/^\d\d:\d\d ana +half a line\n#chat>$/m);
    second.child.kill("SIGKILL");
    await second.ended;
    await serveProcess(t, [], { address: `127.0.0.1:${first.port}` });
    ana.enter("/reconnect");
    await ana.wait(/chat: this server has the key .*\n[^]*\[exit 3\]/);
  },
);

test(
  "at most 500 lines wait while the client is offline, and further ones are dropped with a message",
  TMUX,
  async (t) => {
    const server = await serveProcess(t);
    const ana = new Terminal(t, [BINARY, "join", `ana@127.0.0.1:${server.port}`], { env: { CHAT_PASSWORD: "x" } });
    await ana.wait(/Welcome/);
    server.child.kill("SIGKILL");
    await ana.wait(/\n\[offline\] #chat>$/);
    ana.paste("line\n".repeat(501));
    await ana.wait(/-- 501 lines are too many, with 0 waiting to be sent; nothing of it is sent\n\[offline\] #chat>$/);
    ana.paste("line\n".repeat(500));
    await ana.wait(/Send these 500 lines to #chat\? \(yes\/no\)$/);
    ana.enter("yes");
    await ana.wait(/\n\[offline, 500 waiting\] #chat>$/);
    ana.enter("one more");
    await ana.wait(/-- not sent, as too much waits: one more\n\[offline, 500 waiting\] #chat>$/);
  },
);

test("the operator's console shows the log and runs commands", TMUX, async (t) => {
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

test("in plain mode, too, a pasted command is run only when the person has answered", TMUX, async (t) => {
  const { ana, bo } = await joined(t, { args: ["--plain"], columns: 120 });
  ana.paste("one\n/msg bo secret\n");
  await ana.wait(/Run the pasted "\/msg bo secret", or say all 2 pasted lines to #chat\? \(run\/say\/no\)/);
  ana.enter("no");
  await ana.wait(/-- nothing is sent/);
  ana.paste("two\nthree\n");
  await bo.wait(/ :two\r\n.* :three\r\n/);
  assert.doesNotMatch(bo.all, /one|secret/);
});

test("commands that need the server say so while there is none", TMUX, async (t) => {
  const server = await serveProcess(t);
  const ana = new Terminal(t, [BINARY, "join", `ana@127.0.0.1:${server.port}`], { env: { CHAT_PASSWORD: "x" } });
  await ana.wait(/Welcome/);
  server.child.kill("SIGKILL");
  await ana.wait(/\n\[offline\] #chat>$/);
  for (const command of ["/topic new", "/rooms", "/history", "/part", "/password"]) {
    ana.enter("/clear");
    await ana.wait(/^\[offline\] #chat>$/);
    ana.enter(command);
    await ana.wait(/^-- not connected: that was not done\n\[offline\] #chat>$/);
  }
});

test("in plain mode a changed line is written on a row of its own", TMUX, async (t) => {
  const { ana, bo } = await joined(t, { args: ["--plain"] });
  ana.type("one ");
  ana.paste("two");
  await ana.wait(/\none\s*\none two$/);
  ana.keys("C-c");
  ana.type("three");
  ana.paste(" four\nfive");
  await bo.wait(/ :three four\r\n/);
  await ana.wait(/\none two\nthree\nfive\n\d\d:\d\d ana +three four\nfive$/);
});

test("plain mode writes each line once, without colour, and hides the password", TMUX, async (t) => {
  for (const args of [["--plain"], []]) {
    const { port } = await serveHere(t);
    const bo = await enter(t, port, "bo");
    const dumb = args.length ? [] : ["env", "TERM=dumb"];
    const ana = new Terminal(t, [...dumb, BINARY, "join", `ana@127.0.0.1:${port}`, ...args]);
    await ana.wait(/Password:$/);
    ana.enter("secret");
    await ana.wait(/to register:$/);
    ana.enter("secret");
    await ana.wait(/Welcome to #chat, ana/);
    bo.send("PRIVMSG #chat :hi");
    await ana.wait(/^\d\d:\d\d bo +hi$/m);
    ana.enter("hello");
    await ana.wait(/^hello\n\d\d:\d\d ana +hello$/m);
    assert.doesNotMatch(ana.screen({ history: true }), /secret|>/);
    assert.doesNotMatch(ana.screen({ escapes: true }), /\x1b/);
    ana.enter("/exit");
    await ana.wait(/\[exit 0\]/);
  }
});

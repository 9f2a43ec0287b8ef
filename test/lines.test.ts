import assert from "node:assert/strict";
import { test } from "node:test";
import { cells, clean, cut, fold, format, isNick, isRoom, LIMITS, LineSplitter, parse, wrap } from "../chat.ts";

/** The lines that a splitter has; faults in angle brackets. */
const splits = (splitter: LineSplitter) => {
  const found: string[] = [];
  for (let split; (split = splitter.next());) found.push(split.fault ? `<${split.fault}>` : split.text);
  return found;
};

test("a line is parsed into tags, source, command and parameters", () => {
  const line = parse("@a=1;b;c=x\\:y\\sz :bo!b@h PRIVMSG  #chat  :two  words");
  assert.deepEqual([...line.tags], [["a", "1"], ["b", ""], ["c", "x;y z"]]);
  assert.equal(line.source, "bo!b@h");
  assert.equal(line.command, "PRIVMSG");
  assert.deepEqual(line.params, ["#chat", "two  words"]);
});

test("unusual lines are parsed as Modern IRC and message-tags specify", () => {
  assert.deepEqual(parse("ping").command, "PING");
  assert.deepEqual(parse("JOIN :").params, [""]);
  assert.deepEqual(parse("JOIN #a  ").params, ["#a"]);
  assert.deepEqual(parse("USER a 0 * :").params, ["a", "0", "*", ""]);
  assert.deepEqual(parse("X a:b :c :d").params, ["a:b", "c :d"]);
  assert.deepEqual(parse("X :").params, [""]);
  assert.deepEqual(parse("X ::").params, [":"]);
  assert.deepEqual(parse("").command, "");
  assert.deepEqual(parse(":only.source").command, "");
  assert.deepEqual(parse("@only-tags").tags.size, 1);
  assert.equal(parse("@k=\\\\\\:\\s\\r\\n\\b\\ X").tags.get("k"), "\\; \r\nb");
  assert.equal(parse("@k=1;k=2 X").tags.get("k"), "2");
});

test("a formatted line is parsed to the same tags, source, command and parameters", () => {
  const tags = [["a", "; \\\r\n="], ["+b/c", ""]] as const;
  for (const last of ["", " ", ":", ":a", "a b", "a:b", "ünï 😀"]) {
    const line = parse(format("CMD", ["one", last], "me!me@x", tags));
    assert.deepEqual([...line.tags], tags.map((tag) => [...tag]));
    assert.deepEqual([line.source, line.command, ...line.params], ["me!me@x", "CMD", "one", last]);
  }
});

test("a stream is split at CR, LF and both, whatever the size of its chunks", () => {
  const stream = Buffer.from("one\r\ntwo\nthree\r\r\n\n\nfoür\r\nrest");
  for (let size = 1; size <= stream.length; size++) {
    const splitter = new LineSplitter();
    const found = [];
    for (let at = 0; at < stream.length; at += size) {
      splitter.push(stream.subarray(at, at + size));
      found.push(...splits(splitter));
    }
    assert.deepEqual(found, ["one", "two", "three", "foür"]);
    assert.equal(splitter.buffered, 4);
  }
});

test("nothing of a line end is left in the buffer, even if CR and LF come in two chunks", () => {
  for (const chunks of [["one\r\n"], ["one\r", "\n"], ["one\n"], ["one\r"], ["on", "e\r", "\n\r", "\n"]]) {
    const splitter = new LineSplitter();
    const found = chunks.flatMap((chunk) => {
      splitter.push(Buffer.from(chunk));
      return splits(splitter);
    });
    assert.deepEqual(found, ["one"], JSON.stringify(chunks));
    assert.equal(splitter.buffered, 0, JSON.stringify(chunks));
  }
});

test("nothing is buffered as soon as the last line has been returned", () => {
  for (const lineEnd of ["\n", "\r", "\r\n", "\r\n\r\n"]) {
    const splitter = new LineSplitter();
    splitter.push(Buffer.from(`one${lineEnd}two${lineEnd}`));
    assert.deepEqual(splitter.next(), { text: "one" });
    assert.deepEqual(splitter.next(), { text: "two" });
    assert.equal(splitter.buffered, 0, JSON.stringify(lineEnd));
    splitter.push(Buffer.from(`${"x".repeat(600)}${lineEnd}`));
    assert.deepEqual(splits(splitter), ["<too long>"]);
    assert.equal(splitter.buffered, 0, JSON.stringify(lineEnd));
  }
});

test("a CR LF in two chunks leaves nothing in the buffer after a line that is too long", () => {
  const splitter = new LineSplitter();
  splitter.push(Buffer.from(`${"x".repeat(600)}\r`));
  assert.deepEqual(splits(splitter), ["<too long>"]);
  splitter.push(Buffer.from("\n"));
  assert.deepEqual(splits(splitter), []);
  assert.equal(splitter.buffered, 0);
});

test("a line may have 512 bytes with its CR LF, and its tags 4096 of their own", () => {
  const check = (line: string) => {
    const splitter = new LineSplitter();
    splitter.push(Buffer.from(`${line}\r\nnext\n`));
    return splits(splitter).map((text) => text.startsWith("<") ? text : text.length);
  };
  assert.deepEqual(check("x".repeat(510)), [510, 4]);
  assert.deepEqual(check("x".repeat(511)), ["<too long>", 4]);
  const tags = `@${"t".repeat(LIMITS.clientTagBytes - 2)} `;
  assert.deepEqual(check(tags + "x".repeat(510)), [tags.length + 510, 4]);
  assert.deepEqual(check(`@t${tags.slice(1)}x`), ["<too long>", 4]);
  assert.deepEqual(check(`@a ${"x".repeat(511)}`), ["<too long>", 4]);
  assert.deepEqual(check(`@${"t".repeat(100_000)}`), ["<too long>", 4]);
});

test("an endless line is reported once and not buffered, and the line after it is read", () => {
  const splitter = new LineSplitter();
  const found = [];
  for (let chunk = 0; chunk < 1000; chunk++) {
    splitter.push(Buffer.alloc(1000, "x"));
    found.push(...splits(splitter));
    assert.ok(splitter.buffered <= LIMITS.bodyBytes + 1000);
  }
  splitter.push(Buffer.from("tail\nnext\n"));
  assert.deepEqual([...found, ...splits(splitter)], ["<too long>", "next"]);
});

test("a line that is not UTF-8 or has a NUL is reported as such, and the next one is read", () => {
  const splitter = new LineSplitter();
  splitter.push(Buffer.from([0x61, 0xff, 0x0a, 0x61, 0x00, 0x0a, 0xc3, 0xa9, 0x0a, 0xed, 0xa0, 0x80, 0x0a]));
  assert.deepEqual(splits(splitter), ["<not UTF-8>", "<NUL>", "é", "<not UTF-8>"]);
});

test("names are casefolded in ASCII only", () => {
  assert.equal(fold("#Ärger[]{}XYZ"), "#Ärger[]{}xyz");
});

test("a nick has 1 to 20 ASCII letters, digits and specials, and is not that of a service", () => {
  for (const nick of ["a", "Ana-2", "[x]\\`_^{|}", "x".repeat(20)]) assert.ok(isNick(nick), nick);
  for (const nick of ["", "2a", "-a", "a b", "añ", "a.b", "x".repeat(21), "NickServ", "#a", "a!b", "*"]) {
    assert.ok(!isNick(nick), nick);
  }
});

test("the name of a room is # and then visible characters without any space and comma", () => {
  for (const room of ["#a", "#Käse", "#日本", "##", "#a:b"]) assert.ok(isRoom(room), room);
  for (
    const room of [
      "#",
      "a",
      "#a b",
      "#a,b",
      "#a\x07",
      "#a\u202eb",
      "#a\u200b",
      "#a\u00a0b",
      "#a\u3000b",
      `#${"x".repeat(50)}`,
      "&a",
    ]
  ) {
    assert.ok(!isRoom(room), JSON.stringify(room));
  }
});

test("a text is cut to a number of bytes, but not inside a character", () => {
  assert.equal(cut("aé😀z", 100), "aé😀z");
  for (let bytes = 0; bytes <= 8; bytes++) {
    const short = cut("aé😀z", bytes);
    assert.ok(Buffer.byteLength(short) <= bytes && "aé😀z".startsWith(short));
    assert.ok(!short.includes("\ufffd"));
  }
});

test("clean drops what is invisible and harmless, and replaces what could deceive", () => {
  const kept = /[\uFE0E\uFE0F\u0600-\u0605\u06DD\u070F\u0890\u0891\u08E2\u{110BD}\u{110CD}]/u; // the numbers' signs are visible
  const deceives = /[\p{Cc}\p{Zl}\p{Zp}\p{Co}\u202A-\u202E\u2066-\u2069\u115F\u1160\u3164\uFFA0\uFFF9-\uFFFB]/u;
  const formats = new RegExp("[\t\x02-\x04\x0f\x11\x16\x1d-\x1f]"); // a tab becomes a space; the others are IRC's
  for (let code = 0; code <= 0x10ffff; code++) {
    if (code >= 0xd800 && code <= 0xdfff) continue;
    const char = String.fromCodePoint(code);
    if (formats.test(char)) continue;
    const isInvisible = /[\p{Cf}\p{DI}]/u.test(char) && !kept.test(char);
    const expected = deceives.test(char) ? "a\ufffdb" : isInvisible ? "ab" : `a${char}b`;
    assert.equal(clean(`a${char}b`), expected, code.toString(16));
  }
});

test("clean removes IRC's formatting, and keeps what emoji and letters are composed of", () => {
  assert.equal(clean("\x02bold\x02 \x0304,12red\x03 \x1d\x1f\x16\x0f\x04ff0000x"), "bold red x");
  for (const text of ["👨‍👩‍👧", "🏳️‍🌈", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "👩🏽‍💻", "می‌خواهم", "क्‍ष", "❤️", "e\u0301", "שלום", "🇩🇪"]) {
    assert.equal(clean(text), text);
  }
  assert.equal(clean("a\tb"), "a b");
  assert.equal(clean("\x1b[2Jx"), "\ufffd[2Jx");
  assert.equal(clean("a\u200db\u200cc"), "abc");
  assert.equal(
    clean("ភាសា\u200bខ្មែរ soft\u00adhyphen word\u2060joiner ☎\ufe0e"),
    "ភាសាខ្មែរ softhyphen wordjoiner ☎\ufe0e",
  );
  assert.equal(clean(`e${"\u0301".repeat(50)}`), `e${"\u0301".repeat(4)}`);
  assert.equal(clean("\ud800"), "\ufffd");
});

test("the column width of a text is that on a terminal", () => {
  const widths = {
    "": 0,
    abc: 3,
    "é": 1,
    "e\u0301": 1,
    "日本": 4,
    "한": 2,
    "😀": 2,
    "👨‍👩‍👧": 2,
    "🇩🇪": 2,
    "❤️": 2,
    "ｱ": 1,
    "ᄀᄀᄀ": 6,
    "각": 2,
    "\u{17000}\u{1B002}": 4,
    "বাংলা": 5,
    "हिन्दी": 5,
  };
  for (const [text, width] of Object.entries(widths)) assert.equal(cells(text), width, text);
});

test("a long text is wrapped between words, and a long word or link inside", () => {
  assert.deepEqual(wrap("one two three", 7), ["one two", "three"]);
  assert.deepEqual(wrap("abcdefgh", 3), ["abc", "def", "gh"]);
  assert.deepEqual(wrap("see https://example.org/a/long/path ok", 10), [
    "see https:",
    "//example.",
    "org/a/long",
    "/path ok",
  ]);
  assert.deepEqual(wrap("日本語日本語", 5), ["日本", "語日", "本語"]);
  assert.deepEqual(wrap("", 5), [""]);
  for (const row of wrap("a 👨‍👩‍👧 b ".repeat(20), 11)) assert.ok(cells(row) <= 11);
});

import assert from "node:assert/strict";
import { test } from "node:test";
import { cells, clean, cut, fold, format, isNick, isRoom, LIMITS, parse, Splitter, wrap } from "../chat.ts";

const splits = (splitter: Splitter) => {
  const found: (string | undefined)[] = [];
  for (let split; (split = splitter.next());) found.push(split.text ?? `<${split.fault}>`);
  return found;
};

test("a line is parsed into tags, source, command and parameters", () => {
  const line = parse("@a=1;b;c=x\\:y\\sz :bo!b@h PRIVMSG  #chat  :two  words");
  assert.deepEqual([...line.tags], [["a", "1"], ["b", ""], ["c", "x;y z"]]);
  assert.equal(line.source, "bo!b@h");
  assert.equal(line.command, "PRIVMSG");
  assert.deepEqual(line.params, ["#chat", "two  words"]);
});

test("lines that are odd are parsed as the documents say", () => {
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

test("what was formatted is parsed to the same, whatever is in it", () => {
  const tags = [["a", "; \\\r\n="], ["+b/c", ""]] as const;
  for (const last of ["", " ", ":", ":a", "a b", "a:b", "ünï 😀"]) {
    const line = parse(format("CMD", ["one", last], "me!me@x", tags));
    assert.deepEqual([...line.tags], tags.map((tag) => [...tag]));
    assert.deepEqual([line.source, line.command, ...line.params], ["me!me@x", "CMD", "one", last]);
  }
});

test("a stream is split at CR, LF and both, however it is cut into packets", () => {
  const stream = Buffer.from("one\r\ntwo\nthree\r\r\n\n\nfoür\r\nrest");
  for (let size = 1; size <= stream.length; size++) {
    const splitter = new Splitter();
    const found = [];
    for (let at = 0; at < stream.length; at += size) {
      splitter.push(stream.subarray(at, at + size));
      found.push(...splits(splitter));
    }
    assert.deepEqual(found, ["one", "two", "three", "foür"]);
    assert.equal(splitter.size, 4);
  }
});

test("a body has 512 bytes with its CR LF, and tags have 4096 of their own", () => {
  const check = (line: string) => {
    const splitter = new Splitter();
    splitter.push(Buffer.from(`${line}\r\nnext\r\n`));
    return splits(splitter).map((text) => text?.startsWith("<") ? text : text?.length);
  };
  assert.deepEqual(check("x".repeat(510)), [510, 4]);
  assert.deepEqual(check("x".repeat(511)), ["<too long>", 4]);
  const tags = `@${"t".repeat(LIMITS.clientTagBytes - 2)} `;
  assert.deepEqual(check(tags + "x".repeat(510)), [tags.length + 510, 4]);
  assert.deepEqual(check(`@t${tags.slice(1)}x`), ["<too long>", 4]);
  assert.deepEqual(check(`@a ${"x".repeat(511)}`), ["<too long>", 4]);
  assert.deepEqual(check(`@${"t".repeat(100_000)}`), ["<too long>", 4]);
});

test("an endless line is told once, is not kept, and what follows it is read", () => {
  const splitter = new Splitter();
  const found = [];
  for (let piece = 0; piece < 1000; piece++) {
    splitter.push(Buffer.alloc(1000, "x"));
    found.push(...splits(splitter));
    assert.ok(splitter.size <= 1512);
  }
  splitter.push(Buffer.from("tail\nnext\n"));
  assert.deepEqual([...found, ...splits(splitter)], ["<too long>", "next"]);
});

test("bytes that are no UTF-8 and NUL bytes are told apart from lines", () => {
  const splitter = new Splitter();
  splitter.push(Buffer.from([0x61, 0xff, 0x0a, 0x61, 0x00, 0x0a, 0xc3, 0xa9, 0x0a, 0xed, 0xa0, 0x80, 0x0a]));
  assert.deepEqual(splits(splitter), ["<not UTF-8>", "<NUL>", "é", "<not UTF-8>"]);
});

test("names are folded in ASCII only", () => {
  assert.equal(fold("#Ärger[]{}XYZ"), "#Ärger[]{}xyz");
});

test("a nick is 1 to 20 letters, digits and specials, and no service", () => {
  for (const nick of ["a", "Ana-2", "[x]\\`_^{|}", "x".repeat(20)]) assert.ok(isNick(nick), nick);
  for (const nick of ["", "2a", "-a", "a b", "añ", "a.b", "x".repeat(21), "NickServ", "#a", "a!b", "*"]) {
    assert.ok(!isNick(nick), nick);
  }
});

test("a room is # and what shows", () => {
  for (const room of ["#a", "#Käse", "#日本", "##", "#a:b"]) assert.ok(isRoom(room), room);
  for (const room of ["#", "a", "#a b", "#a,b", "#a\x07", "#a\u202eb", "#a\u200b", `#${"x".repeat(50)}`, "&a"]) {
    assert.ok(!isRoom(room), JSON.stringify(room));
  }
});

test("a text is cut at bytes but not inside a character", () => {
  assert.equal(cut("aé😀z", 100), "aé😀z");
  for (let bytes = 0; bytes <= 8; bytes++) {
    const short = cut("aé😀z", bytes);
    assert.ok(Buffer.byteLength(short) <= bytes && "aé😀z".startsWith(short));
    assert.ok(!short.includes("\ufffd"));
  }
});

test("nothing harmful is left by cleaning: no control, no override, nothing invisible", () => {
  for (let code = 0; code <= 0x10ffff; code++) {
    if (code >= 0xd800 && code <= 0xdfff) continue;
    const char = String.fromCodePoint(code);
    const shown = clean(`a${char}b`);
    assert.ok(!/[\p{Cc}\p{Zl}\p{Zp}]/u.test(shown), code.toString(16));
    if (/[\p{Cf}\p{DI}]/u.test(char)) assert.ok(shown === "a\ufffdb" || code === 0xfe0f, code.toString(16));
  }
});

test("cleaning takes IRC's formatting away and keeps what makes emoji and letters", () => {
  assert.equal(clean("\x02bold\x02 \x0304,12red\x03 \x1d\x1f\x16\x0f\x04ff0000x"), "bold red x");
  for (const text of ["👨‍👩‍👧", "🏳️‍🌈", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "👩🏽‍💻", "می‌خواهم", "क्‍ष", "❤️", "e\u0301", "שלום", "🇩🇪"]) {
    assert.equal(clean(text), text);
  }
  assert.equal(clean("a\tb"), "a b");
  assert.equal(clean("\x1b[2Jx"), "\ufffd[2Jx");
  assert.equal(clean("a\u200db\u200cc"), "a\ufffdb\ufffdc");
  assert.equal(clean(`e${"\u0301".repeat(50)}`), `e${"\u0301".repeat(4)}`);
  assert.equal(clean("\ud800"), "\ufffd");
});

test("a text's width is that on a terminal", () => {
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
  };
  for (const [text, width] of Object.entries(widths)) assert.equal(cells(text), width, text);
});

test("long texts are wrapped between words, long words inside, links not at all", () => {
  assert.deepEqual(wrap("one two three", 7), ["one two", "three"]);
  assert.deepEqual(wrap("abcdefgh", 3), ["abc", "def", "gh"]);
  assert.deepEqual(wrap("see https://example.org/a/long/path ok", 10), [
    "see",
    "https://example.org/a/long/path",
    "ok",
  ]);
  assert.deepEqual(wrap("日本語日本語", 5), ["日本", "語日", "本語"]);
  assert.deepEqual(wrap("", 5), [""]);
  for (const row of wrap("a 👨‍👩‍👧 b ".repeat(20), 11)) assert.ok(cells(row) <= 11);
});

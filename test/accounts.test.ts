import assert from "node:assert/strict";
import crypto from "node:crypto";
import { test, type TestContext } from "node:test";
import * as chat from "../chat.ts";

/** Hi() of RFC 5802. */
const pbkdf2: chat.Derivation = (password, salt, cost) =>
  Promise.resolve(crypto.pbkdf2Sync(password, salt, cost, 32, "sha256"));

const RFC7677 = {
  first: "n,,n=user,r=rOprNGfwEbeRWgbNEkqO",
  challenge: "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096",
  final: "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=",
  last: "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=",
};

test("the vectors of RFC 7677 come out to the byte, on both sides", async () => {
  const keys = (salt: Buffer) => chat.deriveKeys("pencil", salt, 4096, pbkdf2);
  const client = chat.scramClient("user", keys, undefined, 4096, "rOprNGfwEbeRWgbNEkqO");
  assert.equal((await client.next()).value, RFC7677.first);
  assert.equal((await client.next(RFC7677.challenge)).value, RFC7677.final);
  assert.deepEqual(await client.next(RFC7677.last), { done: true, value: true });

  const verifier = chat.verifierOf(await keys(Buffer.from("W22ZaJ0SNY7soEsUEjb6gQ==", "base64")));
  const server = chat.scramServer(
    (name) => name === "user" ? verifier : undefined,
    undefined,
    4096,
    "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0",
  );
  server.next();
  assert.equal(server.next(RFC7677.first).value, RFC7677.challenge);
  assert.deepEqual(server.next(RFC7677.final), { done: true, value: RFC7677.last });
});

test("scrypt is that of RFC 7914", async () => {
  const key = await chat.scrypt("pleaseletmein", Buffer.from("SodiumChloride"), 16384);
  const expected = crypto.scryptSync("pleaseletmein", "SodiumChloride", 32, { N: 16384, r: 8, p: 3 });
  assert.deepEqual(key, expected);
  // RFC 7914, 12: with p = 1 this is the published vector.
  const vector = crypto.scryptSync("pleaseletmein", "SodiumChloride", 64, { N: 16384, r: 8, p: 1 }).toString("hex");
  assert.ok(vector.startsWith("7023bdcb3afd7348461c06cd81fd38eb"));
});

test("passwords are normalised to NFC", async () => {
  const salt = Buffer.alloc(16);
  assert.deepEqual(await chat.deriveKeys("caf\u00e9", salt), await chat.deriveKeys("cafe\u0301", salt));
});

/** A login by SCRAM between both sides, each with its own view of the certificate; what each ends with. */
async function login(
  password: string,
  { serverBinding = Buffer.alloc(32, 1), name = "ana" } = {},
) {
  const account = chat.verifierOf(await chat.deriveKeys("right"));
  const client = chat.scramClient(name, (salt) => chat.deriveKeys(password, salt), Buffer.alloc(32, 1));
  const server = chat.scramServer((who) => who === "ana" ? account : undefined, serverBinding);
  server.next();
  const challenge = server.next(String((await client.next()).value));
  if (challenge.done) return { server: challenge.value, client: undefined };
  const last = server.next(String((await client.next(challenge.value)).value));
  return { server: last.value, client: (await client.next(last.value)).value };
}

test("the right password is proved by both sides", async () => {
  const { server, client } = await login("right");
  assert.match(server, /^v=/);
  assert.equal(client, true);
});

test("a wrong password, a wrong certificate and an unknown name are told apart", async () => {
  assert.equal((await login("wrong")).server, "e=invalid-proof");
  assert.equal((await login("right", { serverBinding: Buffer.alloc(32, 2) })).server, "e=channel-bindings-dont-match");
  assert.equal((await login("right", { name: "bo" })).server, "e=unknown-user");
});

test("the client asks for no key until the challenge is as it must be", async () => {
  const salt = crypto.randomBytes(16).toString("base64");
  const bad = (nonce: string) => [
    `r=${nonce},s=${salt},i=32768`, // does not add to the nonce
    `r=other${nonce},s=${salt},i=32768`,
    `r=${nonce}x,s=${salt},i=1024`, // other costs
    `r=${nonce}x,s=${salt},i=1048576`,
    `r=${nonce}x,s=AAAA,i=32768`, // another length of salt
    `r=${nonce}x,i=32768`,
    "",
    "e=other-error",
  ];
  for (const index of bad("").keys()) {
    const client = chat.scramClient("ana", () => assert.fail("derived a key"), Buffer.alloc(32), chat.COST, "abc");
    await client.next();
    assert.deepEqual(await client.next(bad("abc")[index] ?? ""), { done: true, value: false });
  }
});

test("the client is not content with a server that cannot prove itself", async () => {
  const keys = await chat.deriveKeys("right");
  for (const last of ["v=", `v=${Buffer.alloc(32).toString("base64")}`, "", "e=invalid-proof"]) {
    const client = chat.scramClient("ana", () => Promise.resolve(keys), Buffer.alloc(32), chat.COST, "abc");
    await client.next();
    await client.next(`r=abcdef,s=${keys.salt.toString("base64")},i=${chat.COST}`);
    assert.deepEqual(await client.next(last), { done: true, value: false });
  }
});

test("the server refuses messages that are malformed or weaker than it asks for", async () => {
  const account = chat.verifierOf(await chat.deriveKeys("right"));
  const start = (first: string) => {
    const server = chat.scramServer(() => account, Buffer.alloc(32));
    server.next();
    return server.next(first);
  };
  const bad = [
    "",
    "n,,n=a,r=b",
    "y,,n=a,r=b",
    "p=tls-unique,,n=a,r=b",
    "p=tls-server-end-point,,r=b",
    "p=tls-server-end-point,,n=a",
    "p=tls-server-end-point,,m=x,n=a,r=b",
  ];
  for (const first of bad) assert.match(String(start(first).value), /^e=/, first);
  assert.match(String(start("p=tls-server-end-point,,n=a,r=b").value), /^r=b.+,s=.+,i=32768$/);
});

test("a verifier is read as it was written, and no other form of one is taken", async () => {
  const verifier = chat.verifierOf(await chat.deriveKeys("x"));
  const text = chat.formatVerifier(verifier);
  assert.deepEqual(chat.readVerifier(text), verifier);
  for (
    const bad of [
      text.replace("32768", "1024"),
      text.replace("SCRYPT", "SHA-256"),
      text.slice(0, -4),
      `${text}x`,
      text.replace(":", ":AA"),
      text.toLowerCase(),
      "SCRAM-",
      "scram-scrypt$",
    ]
  ) {
    assert.equal(chat.readVerifier(bad), "bad", bad);
  }
  assert.equal(chat.readVerifier("secret"), undefined);
});

test("attempts are counted at an IPv4 address, and at the /64 of an IPv6 one", () => {
  assert.equal(chat.networkOf("10.1.2.3"), "10.1.2.3");
  assert.equal(chat.networkOf("::ffff:10.1.2.3"), "10.1.2.3");
  assert.equal(chat.networkOf("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::/64");
  assert.equal(chat.networkOf("2001:db8:1:2::6"), "2001:db8:1:2::/64");
  assert.equal(chat.networkOf("2001:db8::6"), "2001:db8:0:0::/64");
  assert.equal(chat.networkOf("::1"), "0:0:0:0::/64");
  assert.equal(chat.networkOf("fe80::1%eth0"), "fe80:0:0:0::/64");
});

/** Makes scrypt quick and worthless, where only the order of its calls counts. */
function quickScrypt(t: TestContext): void {
  type Callback = (error: Error | null, key: Buffer) => void;
  t.mock.method(
    crypto,
    "scrypt",
    (_password: unknown, _salt: unknown, bytes: number, _options: unknown, done: Callback) => {
      setImmediate(done, null, Buffer.alloc(bytes));
    },
  );
}

/** Somebody at an address. */
const from = (address: string, closed = false) => ({ address, closed });

const PER_ADDRESS = 5;

/** A map of accounts with one that was registered at home. */
async function accounts() {
  const all = new chat.Accounts(
    (nick, verifier) => ({ nick, verifier, networks: new Set<string>() }),
    PER_ADDRESS,
  );
  const home = from("10.0.0.1");
  await all.register("ana", chat.verifierOf(await chat.deriveKeys("right")), home);
  await all.login("ana", "right", home);
  return { all, home };
}

test("guessing is slow: after ten tries from one address there are no more for it", async () => {
  const { all, home } = await accounts();
  for (let tries = 0; tries < chat.LIMITS.triesPerAccount; tries++) {
    assert.equal(await all.login("ana", "wrong", from("10.0.0.2")), "wrong");
  }
  assert.equal(await all.login("ana", "right", from("10.0.0.2")), "often");
  assert.equal(typeof await all.login("ana", "right", home), "object", "the owner is not locked out");
});

test("an address that tries many accounts is told to wait, whichever it tries", async (t) => {
  quickScrypt(t);
  const { all } = await accounts();
  const verifier = chat.verifierOf(await chat.deriveKeys("x"));
  const each = chat.LIMITS.triesPerAccount - 1;
  const limit = chat.LIMITS.triesPerAddress + PER_ADDRESS;
  for (let at = 0; at <= limit; at++) {
    const nick = `n${Math.floor(at / each)}`;
    await all.register(nick, { ...verifier, storedKey: Buffer.alloc(32, 1) }, from("127.0.0.1"));
    const result = await all.login(nick, "wrong", from("10.0.0.2"));
    assert.equal(result, at < limit ? "wrong" : "often");
  }
});

test("strangers all over the world cannot lock the owner out", async (t) => {
  const { all, home } = await accounts();
  quickScrypt(t);
  const tries = chat.LIMITS.triesOfStrangers;
  for (let at = 0; at < tries + 5; at++) {
    const result = await all.login("ana", "wrong", from(`192.0.2.${at}`));
    assert.equal(result, at < tries ? "wrong" : "often");
  }
  t.mock.restoreAll();
  assert.equal(typeof await all.login("ana", "right", home), "object");
});

test("the right password does not count as a guess, however often it is given", async () => {
  const { all, home } = await accounts();
  for (let at = 0; at < chat.LIMITS.triesPerAccount + 3; at++) {
    assert.equal(typeof await all.login("ana", "right", home), "object");
  }
});

test("somebody who hashes without end lets the others have their turns", async (t) => {
  quickScrypt(t);
  const { all } = await accounts();
  const order: string[] = [];
  const greedy = Array.from(
    { length: 30 },
    (_, at) => all.register(`g${at}`, "x", from("127.0.0.1")).then(() => order.push("greedy")),
  );
  const modest = all.register("modest", "x", from("10.0.0.9")).then(() => order.push("modest"));
  await modest;
  assert.ok(order.indexOf("modest") < 6, `came as number ${order.indexOf("modest")}`);
  await Promise.all(greedy);
});

test("who is gone is passed over; logins and registrations do not wait for each other", async (t) => {
  quickScrypt(t);
  const { all, home } = await accounts();
  const order: string[] = [];
  const gone = { address: "127.0.0.1", closed: false };
  for (let at = 0; at < 50; at++) void all.register(`gone${at}`, "x", gone).then(() => order.push("gone"));
  const others = Array.from(
    { length: 50 },
    (_, at) => all.register(`other${at}`, "x", from(`10.0.1.${at}`)).then(() => order.push("other")),
  );
  gone.closed = true;
  const logins = Array.from({ length: 8 }, () => all.login("ana", "right", home).then(() => order.push("login")));
  await Promise.all([...logins, ...others]);
  assert.equal(order.filter((one) => one === "gone").length, chat.LIMITS.scrypts, "which was running already");
  assert.ok(order.indexOf("other") < 4 && order.lastIndexOf("login") < 20, `${order}`);
});

test("an address can make only so many accounts in an hour, and can queue only so many hashings", async (t) => {
  const { all } = await accounts();
  quickScrypt(t);
  const verifier = chat.verifierOf(await chat.deriveKeys("x"));
  for (let at = 0; at < chat.LIMITS.newAccounts; at++) {
    assert.equal(typeof await all.register(`n${at}`, verifier, from("10.0.0.7")), "object");
  }
  assert.equal(await all.register("late", verifier, from("10.0.0.7")), "often");
  assert.equal(typeof await all.register("late", verifier, from("10.0.0.8")), "object");
  const many = Array.from({ length: 200 }, (_, at) => all.register(`q${at}`, "x", from("127.0.0.1")));
  const made = (await Promise.all(many)).filter((one) => one !== "often").length;
  assert.equal(made, chat.LIMITS.scryptQueue + chat.LIMITS.scrypts);
});

test("there are only so many accounts in all", async () => {
  const { all } = await accounts();
  const verifier = chat.verifierOf(await chat.deriveKeys("x"));
  for (let at = all.all.size; at < chat.LIMITS.accounts; at++) {
    await all.register(`m${at}`, verifier, from("127.0.0.1"));
  }
  assert.equal(await all.register("onemore", verifier, from("127.0.0.1")), "often");
});

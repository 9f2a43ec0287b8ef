import assert from "node:assert/strict";
import crypto from "node:crypto";
import { test, type TestContext } from "node:test";
import * as chat from "../chat.ts";
import { FakeClock, quickScrypt } from "./helpers.ts";

const RFC7677 = {
  first: "n,,n=user,r=rOprNGfwEbeRWgbNEkqO",
  challenge: "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096",
  final: "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=",
  last: "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=",
};

test("SCRAM reproduces the exchange of RFC 7677 byte for byte on both sides", async (t) => {
  type Callback = (error: null, key: Buffer) => void;
  const hi = (password: string, salt: Buffer, bytes: number, _options: unknown, done: Callback) =>
    done(null, crypto.pbkdf2Sync(password, salt, 4096, bytes, "sha256"));
  t.mock.method(crypto, "scrypt", hi); // RFC 7677 has PBKDF2 in its place
  const keys = (salt: Buffer) => chat.deriveKeys("pencil", salt);
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

test("keys are made from a password hashed with scrypt, N = 2^15, r = 8 and p = 3", async () => {
  const salt = crypto.randomBytes(16);
  const salted = crypto.scryptSync("secret", salt, 32, { N: 2 ** 15, r: 8, p: 3, maxmem: 2 ** 26 });
  const hmac = (text: string) => crypto.createHmac("sha256", salted).update(text).digest();
  const expected = { salt, clientKey: hmac("Client Key"), serverKey: hmac("Server Key") };
  assert.deepEqual(await chat.deriveKeys("secret", salt), expected);
});

test("the composed and the decomposed form of a password derive the same keys", async () => {
  const salt = Buffer.alloc(16);
  assert.deepEqual(await chat.deriveKeys("caf\u00e9", salt), await chat.deriveKeys("cafe\u0301", salt));
});

/** A login by SCRAM, each side with its own view of the certificate. @returns what each side ends with */
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

test("with the right password client and server prove to each other that they know it", async () => {
  const { server, client } = await login("right");
  assert.match(server, /^v=/);
  assert.equal(client, true);
});

test("a wrong password, another certificate and an unknown name each have an error of their own", async () => {
  assert.equal((await login("wrong")).server, "e=invalid-proof");
  assert.equal((await login("right", { serverBinding: Buffer.alloc(32, 2) })).server, "e=channel-bindings-dont-match");
  assert.equal((await login("right", { name: "bo" })).server, "e=unknown-user");
});

test("the client derives no key from an invalid challenge", async () => {
  const salt = crypto.randomBytes(16).toString("base64");
  const bad = (nonce: string) => [
    `r=${nonce},s=${salt},i=32768`, // adds nothing to the nonce
    `r=other${nonce},s=${salt},i=32768`,
    `r=${nonce}x,s=${salt},i=1024`, // other costs than all have here
    `r=${nonce}x,s=${salt},i=1048576`,
    `r=${nonce}x,s=AAAA,i=32768`, // another length of the salt
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

test("the client rejects a server that does not prove that it knows the verifier", async () => {
  const keys = await chat.deriveKeys("right");
  for (const last of ["v=", `v=${Buffer.alloc(32).toString("base64")}`, "", "e=invalid-proof"]) {
    const client = chat.scramClient("ana", () => Promise.resolve(keys), Buffer.alloc(32), chat.COST, "abc");
    await client.next();
    await client.next(`r=abcdef,s=${keys.salt.toString("base64")},i=${chat.COST}`);
    assert.deepEqual(await client.next(last), { done: true, value: false });
  }
});

test("the server rejects first messages that are malformed or lack the channel binding", async () => {
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

test("a verifier is read as it was formatted, and every other form is rejected", async () => {
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
    ]
  ) {
    assert.equal(chat.readVerifier(bad), "bad", bad);
  }
  for (const password of ["secret", "SCRAM-", "scram-scrypt$", "SCRAM-SCRYPT$1:x", `${text} `]) {
    assert.equal(chat.readVerifier(password), undefined, password);
  }
});

test("a network is an IPv4 address, or the /64 of an IPv6 address", () => {
  assert.equal(chat.networkOf("10.1.2.3"), "10.1.2.3");
  assert.equal(chat.networkOf("::ffff:10.1.2.3"), "10.1.2.3");
  assert.equal(chat.networkOf("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::/64");
  assert.equal(chat.networkOf("2001:db8:1:2::6"), "2001:db8:1:2::/64");
  assert.equal(chat.networkOf("2001:db8::6"), "2001:db8:0:0::/64");
  assert.equal(chat.networkOf("::1"), "0:0:0:0::/64");
  assert.equal(chat.networkOf("fe80::1%eth0"), "fe80:0:0:0::/64");
  assert.equal(chat.networkOf("2001:db8:1:2::6", 48), "2001:db8:1::/48");
  assert.equal(chat.networkOf("10.1.2.3", 48), "10.1.2.3");
});

/** A client at an address. */
const from = (address: string): chat.Visitor => ({ address, closed: false });
const [HOME, ELSEWHERE] = ["10.0.0.1", "10.0.0.2"];
const BINDING = Buffer.alloc(32, 1);
const PER_ADDRESS = 5;
const TRIES_PER_NETWORK = chat.LIMITS.triesPerNetwork + PER_ADDRESS;

/** An account with the password "right". */
interface TestAccount extends chat.Account {
  readonly networks: Set<string>;
}

/** A refusal, or "often" for one that says for how many seconds. */
const kindOf = (refusal: chat.Refusal) => refusal.replace(/^Too many .*: try again in \d+ s.*$/, "often");

/** A map of accounts on a clock that stands still. */
class TestAccounts extends chat.Accounts<TestAccount> {
  readonly clock: FakeClock;

  constructor(perAddress = PER_ADDRESS, clock = new FakeClock()) {
    super((nick, verifier) => ({ nick, verifier, networks: new Set() }), perAddress, clock);
    this.clock = clock;
  }

  /** Registers accounts from the server's machine, where no limit applies. */
  async add(...nicks: readonly string[]): Promise<void> {
    const verifier = chat.verifierOf(await chat.deriveKeys("right"));
    for (const nick of nicks) {
      assert.equal(typeof await this.register(nick, verifier, from("127.0.0.1")), "object", nick);
    }
  }

  /** Logs in by password. @returns "in", or why not */
  async enter(nick: string, password: string, address: string): Promise<string> {
    const result = await this.login(nick, password, from(address));
    return typeof result === "string" ? kindOf(result) : "in";
  }

  /** Logs in by SCRAM. @returns "in", or why not */
  async enterByScram(nick: string, password: string, address: string): Promise<string> {
    const exchange = this.scram(from(address), BINDING);
    const client = chat.scramClient(nick, (salt) => chat.deriveKeys(password, salt), BINDING);
    for (let message = String((await client.next()).value);;) {
      const step = await exchange(message);
      if ("account" in step) return "in";
      if ("refusal" in step) return kindOf(step.refusal);
      const next = await client.next(step.challenge);
      message = next.done ? "" : next.value; // an empty message accepts the server's proof
    }
  }

  /** Gives wrong passwords, which must all be answered as such. */
  async guess(nick: string, address: string, times: number): Promise<void> {
    for (let at = 0; at < times; at++) assert.equal(await this.enter(nick, "wrong", address), "wrong", `${at}`);
  }
}

/** Accounts with one, "ana", that has logged in from HOME. */
async function withAna(t: TestContext, perAddress?: number): Promise<TestAccounts> {
  quickScrypt(t);
  const accounts = new TestAccounts(perAddress);
  await accounts.add("ana");
  assert.equal(await accounts.enter("ana", "right", HOME), "in");
  return accounts;
}

const names = (prefix: string, count: number) => Array.from({ length: count }, (_, at) => `${prefix}${at}`);

// ---- Limits on guessing

test("a network has ten attempts on an account, then one every 30 s", async (t) => {
  const accounts = await withAna(t);
  await accounts.guess("ana", ELSEWHERE, chat.LIMITS.triesPerAccount);
  assert.equal(await accounts.enter("ana", "right", ELSEWHERE), "often", "the right password is not even checked");
  accounts.clock.tick(29_999);
  assert.equal(await accounts.enter("ana", "wrong", ELSEWHERE), "often");
  accounts.clock.tick(1);
  await accounts.guess("ana", ELSEWHERE, 1);
  assert.equal(await accounts.enter("ana", "wrong", ELSEWHERE), "often");
  accounts.clock.tick(90_000);
  await accounts.guess("ana", ELSEWHERE, 3);
  assert.equal(await accounts.enter("ana", "wrong", ELSEWHERE), "often");
  accounts.clock.tick(3_600_000);
  await accounts.guess("ana", ELSEWHERE, chat.LIMITS.triesPerAccount);
  assert.equal(await accounts.enter("ana", "wrong", ELSEWHERE), "often", "the attempts never exceed ten at once");
  assert.equal(await accounts.enter("ana", "right", HOME), "in", "the owner is not locked out");
});

test("an account's known network has ten attempts on it as well, then one every 30 s", async (t) => {
  const accounts = await withAna(t);
  await accounts.guess("ana", HOME, chat.LIMITS.triesPerAccount);
  assert.equal(await accounts.enter("ana", "right", HOME), "often");
  accounts.clock.tick(30_000);
  assert.equal(await accounts.enter("ana", "right", HOME), "in");
  await accounts.guess("ana", HOME, 1);
  assert.equal(await accounts.enter("ana", "wrong", HOME), "often");
});

test("attempts that wait to be answered are charged already", async (t) => {
  const accounts = await withAna(t);
  const tries = Array.from(
    { length: chat.LIMITS.triesPerAccount + 5 },
    () => accounts.enter("ana", "wrong", ELSEWHERE),
  );
  const results = await Promise.all(tries);
  assert.equal(results.filter((result) => result === "wrong").length, chat.LIMITS.triesPerAccount);
  assert.equal(results.filter((result) => result === "often").length, 5);
});

test("a network has a number of attempts on all accounts together, then one a second", async (t) => {
  const accounts = await withAna(t);
  const each = chat.LIMITS.triesPerAccount - 1;
  const nicks = names("n", Math.ceil((TRIES_PER_NETWORK + 3) / each));
  await accounts.add(...nicks);
  const next = (() => {
    let at = 0;
    return () => accounts.enter(nicks[Math.floor(at++ / each)] ?? "", "wrong", ELSEWHERE);
  })();
  for (let at = 0; at < TRIES_PER_NETWORK; at++) assert.equal(await next(), "wrong", `${at}`);
  assert.equal(await next(), "often");
  accounts.clock.tick(1_000);
  assert.equal(await next(), "wrong");
  assert.equal(await next(), "often");
});

test("a network that used up its attempts does not lock out an account that logged in from it before", async (t) => {
  const accounts = await withAna(t);
  const nicks = names("n", Math.ceil(TRIES_PER_NETWORK / chat.LIMITS.triesPerAccount));
  await accounts.add("bo", ...nicks);
  for (let at = 0; at < TRIES_PER_NETWORK; at++) {
    const nick = nicks[Math.floor(at / chat.LIMITS.triesPerAccount)] ?? "";
    assert.equal(await accounts.enter(nick, "wrong", HOME), "wrong", `${at}`);
  }
  assert.equal(await accounts.enter("bo", "right", HOME), "often", "bo never logged in from there");
  assert.equal(await accounts.enter("bo", "right", ELSEWHERE), "in");
  for (let at = 0; at < 3; at++) assert.equal(await accounts.enter("ana", "right", HOME), "in");
  assert.equal(await accounts.enterByScram("ana", "right", HOME), "in");
});

test("unknown networks have 100 attempts on an account together, then one every 10 s", async (t) => {
  const accounts = await withAna(t);
  for (let at = 0; at < chat.LIMITS.triesOfUnknown; at++) await accounts.guess("ana", `192.0.2.${at}`, 1);
  assert.equal(await accounts.enter("ana", "right", "198.51.100.1"), "often");
  assert.equal(await accounts.enter("ana", "right", HOME), "in", "the owner is not locked out");
  accounts.clock.tick(10_000);
  await accounts.guess("ana", "198.51.100.2", 1);
  assert.equal(await accounts.enter("ana", "wrong", "198.51.100.3"), "often");
  accounts.clock.tick(10_000);
  assert.equal(await accounts.enter("ana", "right", "198.51.100.4"), "in");
});

test("attempts that are refused unread are not charged", async (t) => {
  const accounts = await withAna(t);
  await accounts.guess("ana", ELSEWHERE, chat.LIMITS.triesPerAccount);
  for (let at = 0; at < 500; at++) assert.equal(await accounts.enter("ana", "wrong", ELSEWHERE), "often");
  accounts.clock.tick(30_000);
  assert.equal(await accounts.enter("ana", "right", ELSEWHERE), "in");
  assert.equal(await accounts.enter("ana", "right", "198.51.100.1"), "in");
});

test("a right attempt gives its charge back to every limit, however often it is made", async (t) => {
  const accounts = await withAna(t);
  const nicks = names("n", TRIES_PER_NETWORK + 3);
  await accounts.add(...nicks);
  for (let at = 0; at < chat.LIMITS.triesPerAccount + 3; at++) {
    assert.equal(await accounts.enter("ana", "right", HOME), "in");
    assert.equal(await accounts.enterByScram("ana", "right", HOME), "in");
  }
  for (const nick of nicks) assert.equal(await accounts.enter(nick, "right", ELSEWHERE), "in", nick);
  for (let at = 0; at < chat.LIMITS.triesOfUnknown + 3; at++) {
    assert.equal(await accounts.enter("ana", "right", `192.0.2.${at}`), "in");
  }
  await accounts.guess("n0", ELSEWHERE, chat.LIMITS.triesPerAccount);
  assert.equal(await accounts.enter("n0", "right", ELSEWHERE), "often");
});

test("right attempts that are made at once from a new network give all their charges back", async (t) => {
  const accounts = await withAna(t);
  for (let network = 0; network < 20; network++) {
    const address = `192.0.2.${network}`;
    const logins = Array.from({ length: 8 }, () => accounts.enter("ana", "right", address));
    assert.deepEqual(new Set(await Promise.all(logins)), new Set(["in"]), address);
  }
});

test("SCRAM proofs are charged as passwords are", async (t) => {
  const accounts = await withAna(t);
  for (let at = 0; at < chat.LIMITS.triesPerAccount; at++) {
    assert.equal(await accounts.enterByScram("ana", "wrong", ELSEWHERE), "wrong");
  }
  assert.equal(await accounts.enterByScram("ana", "right", ELSEWHERE), "often");
  assert.equal(await accounts.enter("ana", "right", ELSEWHERE), "often");
  accounts.clock.tick(30_000);
  assert.equal(await accounts.enterByScram("ana", "right", ELSEWHERE), "in");
});

test("an account remembers the networks that it used last, and treats older ones as unknown", async (t) => {
  const accounts = await withAna(t);
  const recent = names("192.0.2.", chat.LIMITS.knownNetworks);
  for (const address of recent) assert.equal(await accounts.enter("ana", "right", address), "in");
  assert.deepEqual([...accounts.find("ana")?.networks ?? []], recent);
  for (let at = 0; at < chat.LIMITS.triesOfUnknown; at++) await accounts.guess("ana", `198.51.100.${at}`, 1);
  assert.equal(await accounts.enter("ana", "right", HOME), "often");
  for (const address of recent) assert.equal(await accounts.enter("ana", "right", address), "in");
});

test("a refusal says for how many seconds, and it is true", async (t) => {
  const accounts = await withAna(t);
  await accounts.guess("ana", ELSEWHERE, chat.LIMITS.triesPerAccount);
  accounts.clock.tick(12_345);
  assert.equal(await accounts.login("ana", "right", from(ELSEWHERE)), "Too many attempts: try again in 18 s");
  accounts.clock.tick(18_000);
  assert.equal(await accounts.enter("ana", "right", ELSEWHERE), "in");
});

test("the /64 networks of one IPv6 /48 share their attempts on all accounts together, and their registrations", async (t) => {
  const accounts = await withAna(t);
  await accounts.add(...names("n", TRIES_PER_NETWORK));
  for (let at = 0; at < TRIES_PER_NETWORK; at++) await accounts.guess(`n${at}`, `2001:db8:1:${at.toString(16)}::1`, 1);
  assert.equal(await accounts.enter("n0", "right", "2001:db8:1:ffff::1"), "often");
  assert.equal(await accounts.enter("n0", "right", "2001:db8:2:ffff::1"), "in");
  const verifier = chat.verifierOf(await chat.deriveKeys("right"));
  const register = (nick: string, network: string) => accounts.register(nick, verifier, from(`2001:db8:${network}::1`));
  for (let at = 0; at < chat.LIMITS.newAccountsPerHour; at++) {
    assert.equal(typeof await register(`new${at}`, `3:${at}`), "object");
  }
  assert.match(String(await register("late", "3:fff")), /^Too many new accounts .*: try again in 180 s, or ask/);
  assert.equal(typeof await register("late", "4:fff"), "object");
});

// ---- Hashing in turn

test("200 password logins of one network at once all get in, in turn with those of other networks", async (t) => {
  const accounts = await withAna(t, 200);
  const [crowd, others] = [names("crowd", 200), names("other", 5)];
  await accounts.add(...crowd, ...others);
  const order: string[] = [];
  const enter = async (nick: string, address: string) => {
    assert.equal(await accounts.enter(nick, "right", address), "in", nick);
    order.push(nick);
  };
  const logins = crowd.map((nick) => enter(nick, ELSEWHERE));
  const late = others.map((nick, at) => enter(nick, `192.0.2.${at}`));
  await Promise.all([...logins, ...late]);
  assert.equal(order.length, 205);
  const last = order.findLastIndex((nick) => nick.startsWith("other"));
  assert.ok(last <= others.length + 2 * chat.LIMITS.scrypts, `the last of the others came as number ${last}`);
});

test("a network that registers many accounts at once does not delay the registration of another one", async (t) => {
  const accounts = await withAna(t);
  const order: string[] = [];
  const register = async (nick: string, address: string) => {
    assert.equal(typeof await accounts.register(nick, "right", from(address)), "object", nick);
    order.push(nick);
  };
  const many = names("many", 30).map((nick) => register(nick, "127.0.0.1"));
  await Promise.all([...many, register("one", ELSEWHERE)]);
  assert.equal(order.length, 31);
  assert.ok(order.indexOf("one") < 6, `it came as number ${order.indexOf("one")}`);
});

test("nothing is hashed for a client that has disconnected before its turn", async (t) => {
  const hashed = quickScrypt(t);
  const accounts = new TestAccounts();
  const client = { address: "127.0.0.1", closed: false };
  const results = names("gone", 50).map((nick) => accounts.register(nick, "right", client));
  const other = accounts.register("other", "right", from(ELSEWHERE));
  client.closed = true;
  assert.equal(typeof await other, "object");
  const registered = (await Promise.all(results)).filter((result) => typeof result === "object").length;
  assert.equal(registered, chat.LIMITS.scrypts, "those that were being hashed already");
  assert.equal(hashed(), chat.LIMITS.scrypts + 1);
});

test("50 networks that register delay a login by one round of turns at most", async (t) => {
  const accounts = await withAna(t);
  const order: string[] = [];
  const others = names("other", 50).map(async (nick, at) => {
    await accounts.register(nick, "right", from(`192.0.2.${at}`));
    order.push("registration");
  });
  const login = async () => {
    assert.equal(await accounts.enter("ana", "right", HOME), "in");
    order.push("login");
  };
  await Promise.all([...others, login(), login()]);
  assert.equal(order.length, 52);
  assert.ok(order.indexOf("login") >= 0 && order.indexOf("login") <= 50, `${order}`);
});

// ---- Limits on registering

test("a network can register 20 accounts at once, then one every three minutes", async (t) => {
  const accounts = await withAna(t);
  const verifier = chat.verifierOf(await chat.deriveKeys("right"));
  const register = async (nick: string, address: string) => {
    const result = await accounts.register(nick, verifier, from(address));
    return typeof result === "string" ? kindOf(result) : "registered";
  };
  for (const nick of names("n", chat.LIMITS.newAccountsPerHour)) {
    assert.equal(await register(nick, ELSEWHERE), "registered");
  }
  assert.equal(await register("late", ELSEWHERE), "often");
  assert.equal(await register("other", HOME), "registered", "another network has its own limit");
  accounts.clock.tick(3_600_000 / chat.LIMITS.newAccountsPerHour);
  assert.equal(await register("late", ELSEWHERE), "registered");
  assert.equal(await register("later", ELSEWHERE), "often");
  accounts.decide("later", "admitted");
  assert.equal(await register("Later", ELSEWHERE), "registered", "the operator has admitted the nick");
  for (const nick of names("local", 3 * chat.LIMITS.newAccountsPerHour)) {
    assert.equal(await register(nick, "::1"), "registered", "loopback has no limit");
  }
});

test("an admitted nick can be registered once, within the hour, though registration is closed and the nick barred", async (t) => {
  const accounts = await withAna(t);
  const register = async (nick: string) => {
    const result = await accounts.register(nick, "right", from(ELSEWHERE));
    return typeof result === "string" ? result : "registered";
  };
  accounts.barred.set("bo", "forgotten");
  assert.equal(await register("bo"), "forgotten");
  accounts.decide("Bo", "admitted");
  accounts.clock.tick(chat.LIMITS.admitMs);
  assert.equal(await register("bo"), "forgotten", "an hour has passed");
  accounts.locked = true;
  accounts.decide("bo", "admitted");
  assert.equal(await register("cy"), "closed");
  assert.equal(await register("bo"), "registered");
  accounts.byNick.delete("bo");
  assert.equal(await register("bo"), "closed", "it was admitted once");
});

test("of two clients that register the same nick at once, one gets it", async (t) => {
  const accounts = await withAna(t);
  const both = await Promise.all(["bo", "BO"].map((nick) => accounts.register(nick, "right", from(ELSEWHERE))));
  assert.equal(both.filter((result) => typeof result === "object").length, 1);
  assert.equal(both.filter((result) => result === "exists").length, 1);
});

test("the number of accounts is limited", async (t) => {
  const accounts = await withAna(t);
  await accounts.add(...names("m", chat.LIMITS.accounts - accounts.byNick.size));
  const verifier = chat.verifierOf(await chat.deriveKeys("right"));
  assert.equal(await accounts.register("onemore", verifier, from("127.0.0.1")), "full");
  accounts.decide("onemore", "admitted");
  assert.equal(typeof await accounts.register("onemore", verifier, from("127.0.0.1")), "object");
});

// README.md: every block of commands is run as it is printed, on a free port.
import assert from "node:assert/strict";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { test, type TestContext } from "node:test";
import {
  enter,
  environment,
  freePort,
  type Irc,
  keyHash,
  ROOT,
  Running,
  RUNTIMES,
  serveProcess,
  Terminal,
  wants,
} from "./helpers.ts";

/** The commands of each block that is set in, without what they print. */
const BLOCKS = [...fs.readFileSync(path.join(ROOT, "README.md"), "utf8").matchAll(/(?<=\n\n)(?: {4}.*\n|\n)+/g)]
  .map(([block]) => block.replace(/^ {4}/gm, "").trim())
  .map((block) => block.startsWith("$ ") ? block.split("\n")[0]?.slice(2) ?? "" : block);

/** A folder in which the commands find what they name: the program, its source, and the runtimes. */
class Place {
  readonly #test: TestContext;
  readonly folder: string;

  constructor(t: TestContext) {
    this.#test = t;
    this.folder = fs.mkdtempSync(path.join(os.tmpdir(), "chat-readme-"));
    t.after(() => fs.rmSync(this.folder, { recursive: true, force: true }));
    for (const name of ["dist", "chat.ts"]) fs.symlinkSync(path.join(ROOT, name), path.join(this.folder, name));
    fs.mkdirSync(path.join(this.folder, "bin"));
    const programs = { node: process.execPath, chat: RUNTIMES.binary()[0], deno: RUNTIMES.deno()[0] };
    for (const [name, file = ""] of Object.entries(programs)) {
      fs.symlinkSync(file, path.join(this.folder, "bin", name));
    }
  }

  /** Runs a block in bash. What differs from the printed text: addresses, and an address for the server. */
  run(block: string, port: number, env: Readonly<Record<string, string>> = {}): Running {
    const script = block.replace(/ serve(?! \d)/, ` serve 127.0.0.1:${port}`).replace(/^npm start$/, `$& -- :${port}`)
      .replaceAll("8080", String(port)).replace(/0\.0\.0\.0|chat\.example/g, "127.0.0.1").replace("=… ", "=secret ");
    const found = { PATH: `${this.folder}/bin:${process.env["PATH"]}`, ...env };
    return new Running(this.#test, ["bash", "-c", script], found, { cwd: this.folder, detached: true });
  }

  file(name: string): string {
    return fs.readFileSync(path.join(this.folder, name), "utf8");
  }
}

/** Runs a block that serves, and returns somebody who has entered that room. */
async function serves(t: TestContext, block: string, place = new Place(t)): Promise<{ bo: Irc; running: Running }> {
  const port = await freePort();
  const running = place.run(block, port);
  await running.err.wait(new RegExp(`serving #chat on 127.0.0.1:${port}\n`));
  return { bo: await enter(t, port, "bo", "echo-message"), running };
}

/** Serves a room for a block, with somebody in it. */
async function room(t: TestContext): Promise<{ place: Place; port: number; pin: string; bo: Irc }> {
  const { port, pin } = await serveProcess(t);
  return { place: new Place(t), port, pin, bo: await enter(t, port, "bo", "echo-message") };
}

/** What shows that a block works, by its first words. */
const RUNS: Readonly<Record<string, (t: TestContext, block: string) => Promise<unknown>>> = {
  "npm start": async (t, block) => {
    const place = new Place(t);
    fs.unlinkSync(path.join(place.folder, "dist")); // it builds, and not over the program that the other tests run
    for (const name of ["build.mjs", "package.json"]) {
      fs.copyFileSync(path.join(ROOT, name), path.join(place.folder, name));
    }
    fs.symlinkSync(path.join(ROOT, "node_modules"), path.join(place.folder, "node_modules"));
    fs.mkdirSync(path.join(place.folder, "dist", "runtime"), { recursive: true });
    fs.symlinkSync(process.execPath, path.join(place.folder, "dist", "runtime", path.basename(process.execPath)));
    await serves(t, block, place);
  },
  "dist/chat serve": serves,
  "dist/chat join": async (t, block) => {
    const { place, port, bo } = await room(t);
    const command = `cd ${place.folder} && ${block.replace("8080", String(port))}`;
    const ana = new Terminal(t, ["sh", "-c", command], { env: environment() });
    await ana.wait(/Nick:$/);
    ana.enter("ana");
    await ana.wait(/Password:$/);
    ana.enter("secret");
    await ana.wait(/Repeat the password to register:$/);
    ana.enter("secret");
    await ana.wait(/Welcome to #chat, ana\. Here: bo\./);
    ana.enter("hello bo, this works");
    await bo.wait(/:ana!ana@chat PRIVMSG #chat :hello bo, this works\r\n/);
  },
  "echo": async (t, block) => {
    const { place, port, bo } = await room(t);
    assert.equal(await place.run(block, port).ended, 0);
    await bo.wait(/:bot!bot@chat PRIVMSG #chat :the build is done\r\n/);
  },
  "mkfifo": async (t, block) => {
    const { place, port, bo } = await room(t);
    place.run(block, port);
    await bo.wait(/:bot!bot@chat JOIN #chat\r\n/);
    bo.send("PRIVMSG #chat :!time");
    await bo.wait(/:bot!bot@chat PRIVMSG #chat :bo: it is \d\d:\d\d\r\n/);
    bo.send("PRIVMSG bot :!time");
    await bo.wait(/:bot!bot@chat PRIVMSG bo :it is \d\d:\d\d\r\n/);
  },
  "printf": async (t, block) => {
    const { place, port, pin, bo } = await room(t);
    const step = place.run(block, port, { JOB: "deploy", PIN: pin, CHAT_PASSWORD: "secret" });
    assert.equal(await step.ended, 0, step.err.all);
    await bo.wait(/:ci!ci@chat PRIVMSG #chat :deploy failed\r\n/);
  },
  "dist/chat serve </dev/null": async (t, block) => {
    const [place, port] = [new Place(t), await freePort()];
    const shell = place.run(`${block}\ntail -n +1 -F chat.log`, port);
    await shell.out.wait(/serving #chat/);
    await enter(t, port, "bo");
  },
  "umask": async (t, block) => {
    const place = new Place(t);
    const { bo } = await serves(t, block, place);
    assert.match(await bo.sync(), /PONG/);
    assert.match(place.file("accounts.txt"), /^bo \S+Z SCRAM-SCRYPT\$\S+\n$/);
    assert.equal(fs.statSync(path.join(place.folder, "accounts.txt")).mode & 0o777, 0o600);
  },
  "[Service]": async (t, block) => {
    const [, command = ""] = /^ExecStart=(.*)$/m.exec(block) ?? [];
    const place = new Place(t);
    await serves(t, command, place);
    assert.match(place.file("accounts.txt"), /^bo /);
  },
  "openssl s_client": async (t, block) => {
    const { place, port } = await room(t);
    const hash = place.run(block, port);
    assert.equal(await hash.ended, 0);
    assert.ok(hash.out.all.includes(await keyHash(port)), hash.out.all);
  },
  "node chat.ts": async (t, block) => {
    const commands = block.split("\n");
    assert.equal(commands.length, 3);
    await Promise.all(commands.map((command) => serves(t, command)));
  },
};
/** What cannot be run here: these tests themselves, and the benchmark. */
const NOT_RUN = ["npm test", "npm run bench"];

const runOf = (block: string) =>
  Object.keys(RUNS).filter((words) => block.startsWith(words)).sort((a, b) => b.length - a.length)[0];

test("each block of commands in README.md has a test, and each test its block", () => {
  const rest = BLOCKS.filter((block) => !NOT_RUN.some((words) => block.startsWith(words)));
  assert.deepEqual(rest.map(runOf).sort(), Object.keys(RUNS).sort());
});

for (const block of BLOCKS) {
  const name = runOf(block);
  const run = name && RUNS[name];
  if (run) {
    test(
      `the block of README.md that begins with "${block.split("\n")[0]}" can be typed as it is printed`,
      wants("tmux"),
      async (t) => void await run(t, block),
    );
  }
}

// The lesson in certs/README.md: every command is run as it is printed, in one bash, and prints what is printed below it.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { test } from "node:test";
import { environment, freePort, ROOT, wants } from "./helpers.ts";

interface Step {
  readonly command: string;
  readonly printed: readonly string[];
}

/** The commands of a text, each with what it is to print. A command goes on while its lines end with a pipe. */
function stepsOf(text: string): Step[] {
  const steps: { command: string; printed: string[] }[] = [];
  let isOpen = false; // the command goes on in the next line
  for (const line of text.split("\n")) {
    const [, code] = /^ {4,}(.*)$/.exec(line) ?? [];
    const [, command] = /^ *\$ (.*)$/.exec(code ?? "") ?? [];
    const last = steps.at(-1);
    if (command !== undefined) steps.push({ command, printed: [] });
    else if (isOpen && last) last.command += `\n${code}`;
    else if (code && last && !code.startsWith("# ")) last.printed.push(code.trim()); // "#": only root can do that
    isOpen = /\|$/.test(command ?? (isOpen ? code ?? "" : ""));
  }
  return steps;
}

/** What a printed line stands for: numbers, pins and codes are others each time. */
function patternOf(line: string): RegExp {
  const escaped = line.replace(/[.*+?^${}()|[\]\\]/g, "\\$&").replace(/ +/g, " +");
  const variable = escaped.replace(/[a-z2-7]{4}(-[a-z2-7]{4})+/g, "[a-z2-7-]+").replace(/\d+/g, "\\d+");
  return new RegExp(variable.replace(/ ?\+?…$/, ".*"));
}

test(
  "the lesson about certificates can be typed as it is printed, and shows what it says",
  wants("openssl"),
  async (t) => {
    const folder = fs.mkdtempSync(path.join(os.tmpdir(), "chat-lesson-"));
    t.after(() => fs.rmSync(folder, { recursive: true }));
    for (const name of ["dist", "certs"]) fs.symlinkSync(path.join(ROOT, name), path.join(folder, name));
    let text = fs.readFileSync(path.join(ROOT, "certs", "README.md"), "utf8");
    for (const port of ["8080", "8081", "8082", "8083", "8084"]) text = text.replaceAll(port, String(await freePort()));
    const steps = stepsOf(text);
    assert.ok(steps.length > 20);
    const script = steps.map(({ command }, at) => `echo "@@@${at}@"\n${command}`).join("\n");
    const file = path.join(folder, "output.txt"); // not a pipe, which what runs in the background would keep open
    spawnSync("bash", ["-c", `exec >${file} 2>&1\ntrap 'kill $(jobs -p)' EXIT\n${script}\n`], {
      cwd: folder,
      env: environment({ LANG: "C.UTF-8" }),
      timeout: 90_000,
    });
    const all = fs.readFileSync(file, "utf8");
    for (const [at, { command, printed }] of steps.entries()) {
      const output = all.slice(all.indexOf(`@@@${at}@`));
      for (const line of printed.filter((one) => one !== "…")) {
        assert.match(output, patternOf(line), `${command}\n${line}\n\n${output.slice(0, 2000)}`);
      }
    }
  },
);

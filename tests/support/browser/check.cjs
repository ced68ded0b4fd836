// Opens pages from the disk in headless Chromium and reports what it sees, as JSON on stdout.
//
//   node check.cjs MODULES CHROMIUM OUT PAGE [PAGE ...]
//
// MODULES is a node_modules folder with playwright-core and axe-core, OUT a folder for pictures and prints.
"use strict";
const fs = require("fs");
const os = require("os");
const path = require("path");
const [modules, executablePath, out, ...pages] = process.argv.slice(2);
const { chromium } = require(path.join(modules, "playwright-core"));
const axe = fs.readFileSync(path.join(modules, "axe-core", "axe.min.js"), "utf-8");
const VIEWS = [
  { name: "desktop-light", viewport: { width: 1280, height: 900 }, colorScheme: "light" },
  { name: "desktop-dark", viewport: { width: 1280, height: 900 }, colorScheme: "dark" },
  { name: "phone", viewport: { width: 390, height: 844 }, colorScheme: "light", hasTouch: true, isMobile: true },
];
const ARGS = [
  "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
];

async function look(browser, file, view, profile) {
  const context = await chromium.launchPersistentContext(profile, {
    executablePath, args: ARGS, headless: true, viewport: view.viewport, colorScheme: view.colorScheme,
    hasTouch: !!view.hasTouch, isMobile: !!view.isMobile, bypassCSP: false,
  });
  const page = context.pages()[0] || (await context.newPage());
  const seen = { view: view.name, console: [], requests: [] };
  page.on("console", (m) => { if (m.type() !== "log") seen.console.push(m.text()); });
  page.on("pageerror", (e) => seen.console.push(String(e)));
  page.on("request", (r) => seen.requests.push(r.url()));
  const url = "file://" + path.resolve(file);
  const start = Date.now();
  await page.goto(url, { waitUntil: "load" });
  // The first responses are drawn by the script, and painted.
  await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));
  seen.open_ms = Date.now() - start;
  seen.requests = seen.requests.filter((u) => u !== url);
  seen.width = await page.evaluate(() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]);
  seen.prompts = await page.locator(".prompt").count();
  seen.count = await page.locator("#count").allTextContents();

  const tokens = page.locator("#mapview .tok");
  seen.tokens = await tokens.count();
  if (seen.tokens > 3) {
    const word = page.locator("#mapview .token");
    const told = [await word.innerText()];
    if (view.hasTouch) { await tokens.nth(2).tap(); } else { await tokens.nth(2).hover(); }
    told.push(await word.innerText());
    await page.locator("#mapview .toks").focus();
    await page.keyboard.press("ArrowRight");
    told.push(await word.innerText());
    seen.told = told;
    seen.active = await page.locator("#mapview .toks").getAttribute("aria-activedescendant");
    const fills = () => page.evaluate(() => [...document.querySelectorAll("#mapview .tok")].map((e) => getComputedStyle(e).backgroundColor));
    const before = await fills();
    await page.locator("#mapview input[value=w]").check();
    seen.colours = [new Set(before).size, new Set(await fills()).size];
    await page.locator("#mapview input[value=d]").check();
  }
  if ((await page.locator("#find").count()) && seen.prompts) {
    const first = () => page.locator(".prompt .eyebrow strong").first().innerText();
    const ids = [await first()];
    if (await page.locator("#next").isVisible()) { await page.click("#next"); ids.push(await first()); }
    await page.selectOption("#sort", "gain");
    ids.push(await first());
    await page.fill("#find", "no such words anywhere");
    seen.found_none = await page.locator("#count").innerText();
    await page.fill("#find", "");
    await page.selectOption("#sort", "given");
    seen.walked = ids;
  }
  await page.evaluate(() => window.scrollTo(0, 0));
  const stem = path.join(out, `${path.basename(file, ".html")}-${view.name}`);
  await page.screenshot({ path: `${stem}.png` });
  for (const id of ["training", "cost", "criteria", "lengths", "tokens", "map", "most"]) {
    const part = page.locator(`section#${id}`);
    if (await part.count()) await part.screenshot({ path: `${stem}-${id}.png` });
  }
  if (seen.prompts) await page.locator(".prompt").nth(1).screenshot({ path: `${stem}-prompt.png` });
  if (!view.hasTouch) {
    if (view.name === "desktop-light") {
      await page.pdf({ path: `${stem}.pdf`, format: "A4", printBackground: true });
      seen.pdf_bytes = fs.statSync(`${stem}.pdf`).size;
    }
    await page.click("#theme");
    seen.theme = await page.evaluate(() => document.documentElement.dataset.theme);
    await page.click("#theme");
  }
  // Evaluated from outside, which the page's policy does not bind.
  await page.evaluate(axe);
  const found = await page.evaluate(() => window.axe.run());
  seen.axe = found.violations.map((v) => ({ id: v.id, impact: v.impact, nodes: v.nodes.slice(0, 4).map((n) => n.target.join(" ") + " | " + n.failureSummary.slice(0, 240)) }));
  await context.close();
  return seen;
}

(async () => {
  const results = {};
  for (const file of pages) {
    results[file] = [];
    for (const view of VIEWS) {
      const profile = fs.mkdtempSync(path.join(os.tmpdir(), "rgsd-browser-"));
      try {
        results[file].push(await look(chromium, file, view, profile));
      } finally {
        fs.rmSync(profile, { recursive: true, force: true });
      }
    }
  }
  console.log(JSON.stringify(results, null, 1));
})().catch((error) => { console.error(error); process.exit(1); });

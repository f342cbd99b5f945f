// ------------------------------------------------------------------------------ light and dark

const COLORS = {
  light: ["#0b62a4", "#c24e00", "#00805e", "#b0307f", "#755900", "#4a3fb0", "#555f69", "#a3123a", "#006e80", "#4d7a00", "#8a4b2a", "#7a2fa0"],
  dark: ["#6bb3f5", "#ff9d5c", "#45d0a4", "#f291ca", "#dcbf57", "#aaa2ff", "#b6bec6", "#ff8a9c", "#5ad3e6", "#a5d860", "#e0a98c", "#d49bf2"],
};
// Every role has its own mark and dash as well, so that none needs its colour.
const MARKS = [
  "circle", "path://M0 0h10v10H0z", "path://M5 0l5 9H0z", "path://M5 0l5 5-5 5-5-5z", "path://M4 0h4v4h4v4H8v4H4V8H0V4h4z",
  "path://M0 0h12L6 11z", "path://M1.8 0L6 4.2 10.2 0 12 1.8 7.8 6 12 10.2 10.2 12 6 7.8 1.8 12 0 10.2 4.2 6 0 1.8z",
  "path://M3.5 0h4v11h-4z", "path://M0 0l11 5.5L0 11z", "path://M11 0v11L0 5.5z", "path://M3 0h6l3 5.2-3 5.2H3L0 5.2z", "path://M6 0l1.8 4.1 4.2.4-3.2 2.9 1 4.3L6 9.4 2.2 11.7l1-4.3L0 4.5l4.2-.4z",
];
const DASHES = ["solid", "dashed", "dotted", [9, 3, 2, 3], [3, 2], [12, 4], [2, 5], [9, 3, 2, 3, 2, 3]];

const themeButton = document.getElementById("theme");
const system = window.matchMedia("(prefers-color-scheme: dark)");
const THEMES = { auto: "Theme: automatic", light: "Theme: light", dark: "Theme: dark" };
let chosenTheme = "auto";
// A file opened from disk may have no storage.
try { chosenTheme = localStorage.getItem("farms-fast-theme") ?? "auto"; } catch { /* stays automatic */ }
if (!Object.hasOwn(THEMES, chosenTheme)) chosenTheme = "auto";
let printing = false;

const isDark = () => !printing && (chosenTheme === "dark" || (chosenTheme === "auto" && system.matches));
const colors = () => COLORS[isDark() ? "dark" : "light"];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function applyTheme() {
  document.documentElement.dataset.theme = isDark() ? "dark" : "light";
  themeButton.textContent = THEMES[chosenTheme];
  redraw();
}
themeButton.addEventListener("click", () => {
  const names = Object.keys(THEMES);
  chosenTheme = names[(names.indexOf(chosenTheme) + 1) % names.length];
  try { localStorage.setItem("farms-fast-theme", chosenTheme); } catch { /* for this time only */ }
  applyTheme();
});
system.addEventListener("change", applyTheme);
for (const [event, on] of [["beforeprint", true], ["afterprint", false]]) {
  window.addEventListener(event, () => { printing = on; resizeCharts(); applyTheme(); });
}

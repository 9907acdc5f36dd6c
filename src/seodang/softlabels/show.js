// Arrow keys move from token to token, so that a text is one stop of the Tab key; Escape hides.
for (const text of document.querySelectorAll(".text")) {
  const tokens = [...text.querySelectorAll("[tabindex]")];
  tokens.forEach((token, index) => { token.tabIndex = index ? -1 : 0; });
  text.addEventListener("focusin", (event) => {
    for (const token of tokens) token.tabIndex = token === event.target ? 0 : -1;
  });
  text.addEventListener("keydown", (event) => {
    const at = tokens.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (at < 0 || to === undefined || !tokens[to]) return;
    event.preventDefault();
    tokens[to].focus();
  });
}
// What was used last decides: a key shows the token with the focus, the pointer the one below it.
const page = document.body.classList;
document.addEventListener("keydown", (event) => {
  page.add("keys");
  page.toggle("quiet", event.key === "Escape");
});
document.addEventListener("pointermove", () => page.remove("keys", "quiet"));

// The buttons and keys that mark rows.
if (gallery) (() => {
  const { list, cards, dialog } = gallery;
  const shards = JSON.parse(list.dataset.shards);
  let storage = null;
  try {
    storage = window.localStorage;
  } catch {
    // a page in a sandbox has none
  }
  const marks = marking.open(storage, `legrad-marks ${list.dataset.job}`);

  const rowOf = (card) => ({
    shard: shards[Number(card.dataset.shard)],
    key: card.dataset.key === undefined ? card.querySelector(".sample-key").textContent : JSON.parse(card.dataset.key),
    prompt_index: Number(card.dataset.promptIndex),
    prompt: card.querySelector(".prompt").textContent,
  });
  const isMarkable = (card) => !("unmarkable" in card.dataset);
  for (const card of cards.filter((each) => !isMarkable(each))) {
    for (const button of card.querySelectorAll("[data-mark]")) button.disabled = true;
  }
  const press = (group, mark) => {
    for (const button of group.querySelectorAll("[data-mark]")) button.setAttribute("aria-pressed", String(button.dataset.mark === mark));
  };
  const show = () => {
    for (const card of cards) {
      const mark = isMarkable(card) ? marks.markOf(rowOf(card)) : "";
      if (mark) card.dataset.mark = mark;
      else delete card.dataset.mark;
      press(card, mark);
    }
    const enlarged = gallery.enlarged();
    if (enlarged) showEnlarged(enlarged);
    const all = marks.all(), here = cards.filter((card) => card.dataset.mark).length;
    const count = (mark) => all.filter((row) => row.mark === mark).length;
    byId("marked").textContent = all.length === 0 ? "No row is marked."
      : `${count("good")} marked good, ${count("bad")} marked bad`
        + (all.length > here ? `; ${all.length - here} of them on other pages of this job.` : ".");
    byId("not-kept").hidden = marks.isKept();
    for (const name of ["save-csv", "save-json", "clear-marks"]) byId(name).disabled = all.length === 0;
  };
  const showEnlarged = (card) => {
    press(byId("large-marks"), card.dataset.mark ?? "");
    for (const button of byId("large-marks").querySelectorAll("button")) button.disabled = !isMarkable(card);
  };
  const set = (card, mark) => {
    if (!card || !isMarkable(card)) return;
    marks.set(rowOf(card), mark);
    show();
  };
  const toggle = (card, mark) => set(card, card.dataset.mark === mark ? "" : mark);

  list.addEventListener("click", (event) => {
    const button = event.target.closest("[data-mark]");
    if (button && button.matches("button")) toggle(button.closest(".card"), button.dataset.mark);
  });
  byId("large-marks").addEventListener("click", (event) => {
    if (event.target.dataset.mark) toggle(gallery.enlarged(), event.target.dataset.mark);
  });
  const keys = { g: "good", b: "bad", u: "" };
  const byKey = (event, card) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key.toLowerCase() in keys)) return;
    event.preventDefault();
    set(card, keys[event.key.toLowerCase()]);
  };
  list.addEventListener("keydown", (event) => byKey(event, event.target.closest(".card")));
  dialog.addEventListener("keydown", (event) => byKey(event, gallery.enlarged()));
  gallery.listen("enlarged", showEnlarged);
  window.addEventListener("storage", () => { marks.refresh(); show(); });

  const save = (name, type, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  };
  byId("save-csv").addEventListener("click", () => save("marks.csv", "text/csv", marking.csv(marks.all())));
  byId("save-json").addEventListener("click", () => save("marks.json", "application/json", marking.json(marks.all())));
  const MAX_FILE_BYTES = 32 * 2 ** 20;
  const cardPrompts = new Map(cards.filter(isMarkable).map(rowOf).map((row) => [marking.idOf(row), row.prompt]));
  const textOf = async (file) => {
    if (file.size > MAX_FILE_BYTES) throw new Error(`has ${file.size} bytes; the limit is ${MAX_FILE_BYTES}`);
    try {
      return new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    } catch {
      throw new Error("cannot be read as UTF-8 text");
    }
  };
  // adds the marks of a file to those here, all or none; returns a sentence about them
  const load = async (file) => {
    const rows = marking.read(file.name, await textOf(file), (row) => cardPrompts.get(marking.idOf(row)));
    const { added, changed } = marks.merge(rows);
    const here = rows.filter((row) => cardPrompts.has(marking.idOf(row))).length;
    return `${rows.length} mark${rows.length === 1 ? "" : "s"} loaded from ${file.name}: ${added} new, ${changed} changed, `
      + `${rows.length - added - changed} as before; ${here} of them on this page.`;
  };
  const chooser = byId("marks-file"), result = byId("loaded");
  byId("load-marks").addEventListener("click", () => chooser.click());
  chooser.addEventListener("change", async () => {
    const [file] = chooser.files;
    if (!file) return;
    let isLoaded = true;
    try {
      result.textContent = await load(file);
    } catch (error) {
      isLoaded = false;
      result.textContent = `No mark was loaded from ${file.name}:${error.message.includes("\n") ? "\n" : " "}${error.message}`;
    }
    result.classList.toggle("note", !isLoaded);
    // the same file may be chosen again
    chooser.value = "";
    show();
  });
  byId("clear-marks").addEventListener("click", () => {
    if (window.confirm(`Remove all ${marks.all().length} marks of this job from this browser?`)) {
      marks.clear();
      show();
    }
  });
  show();
})();

// Marks of rows, good or bad: kept by the browser, saved as files and loaded from them. pipeline/config/marks.py reads
// the same files, by the same rules.
const marking = (() => {
  const COLUMNS = ["shard", "key", "prompt_index", "prompt", "mark"];
  const idOf = (row) => JSON.stringify([row.shard, row.key, row.prompt_index]);

  // spreadsheets take a text that begins so for a formula; the reader removes the apostrophe
  const guarded = (value) => (typeof value === "string" && /^'*[=+\-@\t\r]/.test(value) ? `'${value}` : String(value));
  const csv = (rows) => [COLUMNS, ...rows.map((row) => COLUMNS.map((name) => row[name]))]
    .map((values) => values.map((value) => `"${guarded(value).replaceAll('"', '""')}"`).join(",") + "\r\n").join("");
  const json = (rows) => `${JSON.stringify(rows.map((row) => Object.fromEntries(COLUMNS.map((name) => [name, row[name]]))), null, 1)}\n`;

  const isMark = (row) => row !== null && typeof row === "object" && typeof row.shard === "string" && typeof row.key === "string"
    && Number.isInteger(row.prompt_index) && typeof row.prompt === "string" && (row.mark === "good" || row.mark === "bad");

  const MAX_MARKS = 100000, MAX_PROMPT_INDEX = 32767, REPORTED_PROBLEMS = 5, QUOTED_CHARACTERS = 60;
  // a text of a file within a message: short, and without characters that would change how the message is shown
  const quoted = (value) => {
    const text = typeof value === "string" ? value : JSON.stringify(value) ?? "nothing";
    const whole = text.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (letter) => `\\u${letter.codePointAt(0).toString(16).padStart(4, "0")}`);
    return `“${whole.length > QUOTED_CHARACTERS ? `${whole.slice(0, QUOTED_CHARACTERS - 1)}…` : whole}”`;
  };

  // [line, values] of each record; spreadsheets of some countries separate by semicolons
  const csvRecords = (text) => {
    const header = text.split("\n", 1)[0];
    const separator = [",", ";", "\t"].reduce((best, each) => (header.split(each).length > header.split(best).length ? each : best));
    const records = [];
    let values = [], value = "", isQuoted = false, line = 1, started = 1;
    const endRecord = () => {
      values.push(value);
      if (values.length > 1 || value !== "") records.push([started, values]);
      values = [];
      value = "";
    };
    for (let place = 0; place < text.length; place++) {
      const letter = text[place];
      if (letter === "\n") line++;
      if (isQuoted) {
        if (letter !== '"') value += letter;
        else if (text[place + 1] === '"') { value += letter; place++; }
        else isQuoted = false;
      } else if (letter === '"' && value === "") isQuoted = true;
      else if (letter === separator) { values.push(value); value = ""; }
      else if (letter === "\n") { endRecord(); started = line; }
      else if (letter !== "\r" || text[place + 1] !== "\n") value += letter;
    }
    if (isQuoted) throw new Error(`line ${started}: a quotation mark is not closed`);
    endRecord();
    return records;
  };

  // [place, entry] of each mark
  const csvEntries = (text) => {
    const [header, ...records] = csvRecords(text);
    const names = (header?.[1] ?? []).map((name) => name.trim());
    const missing = COLUMNS.filter((name) => name !== "prompt" && !names.includes(name));
    if (missing.length) throw new Error(`the first line does not name ${missing.join(", ")}; expected ${COLUMNS.join(", ")}`);
    return records.map(([line, values]) => {
      const texts = Object.fromEntries(names.map((name, place) => [name, (values[place] ?? "").replace(/^'(?='*[=+\-@\t\r])/, "")]));
      const index = /^\s*\d+\s*$/.test(texts.prompt_index) ? Number(texts.prompt_index) : texts.prompt_index;
      return [`line ${line}`, { ...texts, prompt_index: index }];
    });
  };
  const jsonEntries = (text) => {
    let document;
    try {
      document = JSON.parse(text);
    } catch {
      throw new Error("is not valid JSON");
    }
    if (!Array.isArray(document)) throw new Error("expected a list of marks");
    return document.map((entry, place) => [`entry ${place + 1}`, entry]);
  };

  // what is wrong with an entry; empty if nothing is
  const problemOf = (entry) => {
    if (entry === null || typeof entry !== "object" || Array.isArray(entry)) return `expected an object with ${COLUMNS.join(", ")}`;
    if (typeof entry.shard !== "string" || entry.shard === "") return `shard is ${quoted(entry.shard)}; expected the URL of a shard`;
    if (typeof entry.key !== "string") return `key is ${quoted(entry.key)}; expected the key of a sample`;
    const index = entry.prompt_index;
    if (!Number.isInteger(index) || index < 0 || index > MAX_PROMPT_INDEX) return `prompt_index is ${quoted(index)}; expected a number from 0 to ${MAX_PROMPT_INDEX}`;
    if (typeof (entry.prompt ?? "") !== "string") return `prompt is ${quoted(entry.prompt)}; expected a text`;
    return entry.mark === "good" || entry.mark === "bad" ? "" : `mark is ${quoted(entry.mark)}; expected good or bad`;
  };
  const tidy = (entry) => (typeof entry?.mark === "string" ? { ...entry, mark: entry.mark.trim().toLowerCase() } : entry);
  const isUnmarked = (entry) => entry !== null && typeof entry === "object" && !Array.isArray(entry) && (entry.mark ?? "") === "";
  // prompts may be cut and ended by an ellipsis; an empty one is not known
  const begins = (cut, prompt) => cut.endsWith("…") && prompt.startsWith(cut.slice(0, -1));
  const isSamePrompt = (one, other) => !one || !other || one === other || begins(one, other) || begins(other, one);

  // marks in the text of a file of that name; promptOf: the prompt that this page shows of a row, or undefined.
  // Throws an Error that names what is wrong; its message is text, not HTML.
  const read = (name, text, promptOf = () => undefined) => {
    const form = /\.(csv|json)$/i.exec(name)?.[1].toLowerCase();
    if (!form) throw new Error("expected a file named .csv or .json");
    const entries = (form === "csv" ? csvEntries(text) : jsonEntries(text)).filter(([, entry]) => !isUnmarked(entry));
    if (entries.length > MAX_MARKS) throw new Error(`has ${entries.length} marks; the limit is ${MAX_MARKS}`);
    const rows = new Map(), problems = [];
    for (const [place, untidy] of entries) {
      const entry = tidy(untidy);
      let problem = problemOf(entry);
      if (!problem) {
        const row = { ...Object.fromEntries(COLUMNS.map((column) => [column, entry[column]])), prompt: entry.prompt ?? "" };
        const shown = promptOf(row), id = idOf(row);
        if ((rows.get(id) ?? row).mark !== row.mark) problem = `prompt ${row.prompt_index} of sample ${quoted(row.key)} is marked both good and bad`;
        else if (!isSamePrompt(row.prompt, shown)) problem = `prompt ${row.prompt_index} of sample ${quoted(row.key)} was marked as ${quoted(row.prompt)}, and is ${quoted(shown)} here: these are marks of other prompts`;
        rows.set(id, row);
      }
      if (problem) problems.push(`${place}: ${problem}`);
    }
    const more = problems.length - REPORTED_PROBLEMS;
    if (problems.length) throw new Error([...problems.slice(0, REPORTED_PROBLEMS), ...(more > 0 ? [`and ${more} more problems`] : [])].join("\n"));
    return [...rows.values()];
  };

  // what is stored may have been written by another page
  const parsed = (text) => {
    try {
      const rows = JSON.parse(text ?? "[]");
      return Array.isArray(rows) ? rows.filter(isMark) : [];
    } catch {
      return [];
    }
  };

  // storage: of the browser, or null; other pages of the same job share it, so it is read before each change
  const open = (storage, name) => {
    let rows = new Map(), isKept = true;
    const refresh = () => {
      try {
        rows = new Map(parsed(storage.getItem(name)).map((row) => [idOf(row), row]));
      } catch {
        isKept = false;
      }
    };
    const write = () => {
      try {
        storage.setItem(name, JSON.stringify([...rows.values()]));
      } catch {
        isKept = false;
      }
    };
    refresh();
    return {
      all: () => [...rows.values()],
      markOf: (row) => rows.get(idOf(row))?.mark ?? "",
      set: (row, mark) => {
        if (isKept) refresh();
        if (mark) rows.set(idOf(row), { ...row, mark });
        else rows.delete(idOf(row));
        write();
      },
      // loaded marks replace those of the same rows; returns how many are new, and how many replace another mark
      merge: (loaded) => {
        if (isKept) refresh();
        const counts = { added: 0, changed: 0 };
        for (const row of loaded) {
          const before = rows.get(idOf(row));
          if (!before) counts.added++;
          else if (before.mark !== row.mark) counts.changed++;
          rows.set(idOf(row), { ...row, prompt: row.prompt || before?.prompt || "" });
        }
        write();
        return counts;
      },
      clear: () => { rows = new Map(); write(); },
      refresh: () => { if (isKept) refresh(); },
      isKept: () => isKept,
    };
  };

  return { csv, json, read, open, idOf };
})();

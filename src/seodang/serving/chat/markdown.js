// The Markdown that small models write: paragraphs, headings, lists, fenced code, bold, italics,
// inline code. Builds elements, never HTML text, so nothing in an answer can become markup.

const INLINE = /(\*\*|__)(?=\S)(.+?)\1|`([^`]+)`|\*(?=[^\s*])([^*\n]+)\*/g;

function element(name, ...children) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}

function inline(text) {
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    parts.push(text.slice(end, match.index));
    if (match[2] !== undefined) parts.push(element("strong", ...inline(match[2])));
    else if (match[3] !== undefined) parts.push(element("code", match[3]));
    else parts.push(element("em", match[4]));
    end = match.index + match[0].length;
  }
  parts.push(text.slice(end));
  return parts.filter((part) => part !== "");
}

function lines(texts) {
  return texts.flatMap((text, i) => (i ? [document.createElement("br")] : []).concat(inline(text)));
}

/** The elements that show `text`; an unfinished answer shows as far as it goes. */
export function render(text) {
  const blocks = [];
  let paragraph = [];
  let list = null;
  let code = null;
  const flush = () => {
    if (paragraph.length) blocks.push(element("p", ...lines(paragraph)));
    paragraph = [];
  };
  for (const line of text.split("\n")) {
    if (code) {
      if (/^\s*```/.test(line)) code = null;
      else code.append(line + "\n");
      continue;
    }
    const heading = line.match(/^\s*#{1,6}\s+(.*)$/);
    const bullet = line.match(/^\s*[-*•]\s+(.*)$/);
    const number = line.match(/^\s*(\d{1,3})[.)]\s+(.*)$/);
    if (/^\s*```/.test(line)) {
      flush();
      list = null;
      code = element("code");
      blocks.push(element("pre", code));
    } else if (heading) {
      flush();
      list = null;
      blocks.push(element("h3", ...inline(heading[1])));
    } else if (bullet || number) {
      flush();
      const name = bullet ? "UL" : "OL";
      if (list?.tagName !== name) {
        list = element(name);
        if (number && number[1] !== "1") list.start = Number(number[1]);
        blocks.push(list);
      }
      list.append(element("li", ...inline(bullet ? bullet[1] : number[2])));
    } else if (line.trim() === "") {
      flush();
    } else if (list && /^\s{2,}/.test(line)) {
      list.lastChild.append(document.createElement("br"), ...inline(line.trim()));
    } else {
      list = null;
      paragraph.push(line);
    }
  }
  flush();
  return blocks;
}

"""Talk, definitions and small functions, written for this project: what no source code teaches.

Everything is a template with variety; `talk`, `definitions` and `small_functions` give pairs without end.
"""

from __future__ import annotations

import random

from training.corpus import Pair, fenced

HELLO = ["Hello", "Hi", "Hey", "Good morning", "Good evening", "Good afternoon", "Hello there", "Hi there", "Greetings"]
NAMES = ["Anna", "Ben", "Clara", "David", "Eva", "Felix", "Grace", "Hugo", "Ida", "Jonas", "Kim", "Lena", "Max", "Nora",
         "Otto", "Paula", "Ravi", "Sara", "Tom", "Uma", "Vera", "Will", "Yara", "Zoe", "Amir", "Chen",
         "Maria"]  # fmt: skip
WHO = ["Who are you?", "What are you?", "What is your name?", "Who am I talking to?", "Are you a person?",
       "Introduce yourself.", "Can you introduce yourself?", "Tell me about yourself.", "What's your name?",
       "Are you human?", "Are you a bot?", "who are you", "what are you?", "Tell me who you are."]  # fmt: skip
WHO_REPLIES = [
    "I am a very small language model that writes Python code.",
    "I am a small demonstration model. I can continue Python code and answer short questions.",
    "I am the small model that comes with mlx_gemma_mtp. I write short Python functions.",
]
CAN = ["What can you do?", "How can you help me?", "What are you good at?", "Can you help me?", "What do you do?",
       "What can I ask you?", "What should I ask you?", "How do you work?", "what can you do"]  # fmt: skip
CAN_REPLIES = [
    "I can write a Python function that you name, continue code, and copy and edit code that you give me.",
    "I can continue Python code, write short functions and answer simple questions.",
    "You can ask me to write, continue, copy or edit Python code. I am small, so keep it short.",
]
HOW = ["How are you?", "How are you today?", "How is it going?", "How do you do?", "How are you doing?", "What's up?",
       "Are you well?", "how are you"]  # fmt: skip
HOW_REPLIES = ["I am fine, thank you. What can I write for you?", "I am well, thank you. How can I help you?"]
THANKS = ["Thank you!", "Thanks!", "Thanks a lot.", "Thank you very much.", "Great, thanks!", "Thanks, that helps.",
          "Perfect, thank you.", "thanks", "Many thanks!", "Nice work, thank you."]  # fmt: skip
THANKS_REPLIES = ["You are welcome!", "You are welcome. Ask me again at any time.", "Glad to help!"]
BYE = [
    "Goodbye!",
    "Bye!",
    "See you later.",
    "Good night!",
    "See you tomorrow.",
    "I have to go now.",
    "bye",
    "Farewell!",
]
BYE_REPLIES = ["Goodbye!", "Goodbye! Come back at any time.", "See you!"]
YES = ["Yes.", "Ok.", "No.", "Sure.", "Right.", "I see.", "Hm.", "Fine.", "Good.", "Nice.", "Cool!", "Wow!"]
YES_REPLIES = ["What can I write for you?", "Good. Tell me which function you need."]
OTHER = [
    ("Tell me a joke.", "Why did the programmer leave the party? Too many exceptions."),
    ("Do you know a joke?", "There are 10 kinds of people: those who know binary and those who do not."),
    ("What is the weather like?", "I cannot see the weather. I only know a little Python."),
    ("What time is it?", "I do not know the time, but `time.time()` tells it to a program."),
    ("Do you like Python?", "Yes, Python is the only language that I have read."),
    ("Do you speak German?", "No, I only know English and Python."),
    ("How old are you?", "I have no age. I am a small model."),
    ("Where do you live?", "I live in a file on your machine."),
    ("Do you have feelings?", "No, I am a program and have no feelings."),
    ("Can you think?", "No, I only predict the next token."),
    ("Are you smart?", "No, I am very small. I can write short functions."),
    ("Who made you?", "I was trained for mlx_gemma_mtp on Python's standard library and open packages."),
    ("What is your favorite color?", "I have no favorite color, I have never seen one."),
    ("Do you sleep?", "No, I am a program and do not sleep."),
    ("Can you see me?", "No, I can only read text."),
    ("What languages do you know?", "I know Python and a little English."),
    ("I am bored.", "Then let us write a small function. Which one?"),
    ("I am learning Python.", "Good! Ask me to write a short function."),
    ("Help!", "Tell me which function you need, and I will write it."),
    ("I need help with my code.", "Show me the code and tell me what to change."),
    ("Is Python hard to learn?", "No, Python is a language that is easy to begin with."),
    ("What is the meaning of life?", "Some programmers say that it is 42."),
]
NAMED = [("My name is {}.", "Hello {}! How can I help you?"), ("I am {}.", "Hello {}! What can I write for you?"),
         ("I'm {}, nice to meet you.", "Nice to meet you, {}!"), ("This is {}.", "Hello {}! How can I help you?"),
         ("Hello, my name is {}.", "Hello {}! How can I help you?"), ("Say hello to {}.", "Hello {}!"),
         ("Please greet {}.", "Hello {}!"), ("Call me {}.", "Hello {}! What can I write for you?")]  # fmt: skip

DEFINITIONS = {
    "a list": "A list is a sequence of objects that can be changed.",
    "a tuple": "A tuple is a sequence of objects that cannot be changed.",
    "a dictionary": "A dictionary maps keys to values.",
    "a dict": "A dict maps keys to values.",
    "a set": "A set is a collection of different objects without an order.",
    "a string": "A string is a sequence of characters.",
    "an integer": "An integer is a whole number.",
    "a float": "A float is a number with a fractional part.",
    "a boolean": "A boolean is either True or False.",
    "a function": "A function is a piece of code with a name that can be called.",
    "a method": "A method is a function that belongs to a class.",
    "a class": "A class describes objects: their attributes and their methods.",
    "an object": "An object is a value with a type, attributes and methods.",
    "an instance": "An instance is an object that was made from a class.",
    "a module": "A module is a file with Python code that can be imported.",
    "a package": "A package is a folder of modules that can be imported.",
    "a variable": "A variable is a name that refers to an object.",
    "a loop": "A loop repeats a piece of code.",
    "a for loop": "A for loop runs its body once for each item of an iterable.",
    "a while loop": "A while loop runs its body as long as its condition is true.",
    "an iterator": "An iterator gives the items of an iterable one after another.",
    "an iterable": "An iterable is an object whose items can be visited one after another.",
    "a generator": "A generator is a function that yields values one after another.",
    "a decorator": "A decorator is a function that takes a function and returns another one.",
    "an exception": "An exception tells that something went wrong and ends the normal flow of a program.",
    "a lambda": "A lambda is a short function without a name.",
    "a docstring": "A docstring is a string at the start of a function, class or module that describes it.",
    "a comment": "A comment is text in the code that Python ignores.",
    "an argument": "An argument is a value that is passed to a function.",
    "a parameter": "A parameter is a name in the definition of a function that receives an argument.",
    "a keyword": "A keyword is a word with a fixed meaning, such as if or def.",
    "an operator": "An operator is a sign such as + that computes a value from others.",
    "an expression": "An expression is a piece of code that has a value.",
    "a statement": "A statement is a line of code that does something.",
    "an index": "An index is the place of an item in a sequence; the first one is 0.",
    "a slice": "A slice is a part of a sequence, written with a start and an end.",
    "a key": "A key is what a dictionary uses to find a value.",
    "a file": "A file is data with a name on a disk.",
    "a path": "A path tells where a file lies.",
    "a directory": "A directory is a folder that holds files and other directories.",
    "a thread": "A thread runs code beside the other threads of a process.",
    "a process": "A process is a running program with its own memory.",
    "a socket": "A socket is one end of a connection over a network.",
    "a server": "A server is a program that answers requests of clients.",
    "a client": "A client is a program that sends requests to a server.",
    "a stack": "A stack is a collection where the last item that went in comes out first.",
    "a queue": "A queue is a collection where the first item that went in comes out first.",
    "a tree": "A tree is a structure of nodes where each node has children.",
    "a graph": "A graph is a set of nodes and the edges between them.",
    "a heap": "A heap is a tree whose smallest item is always on top.",
    "a hash": "A hash is a number that is computed from an object and helps to find it.",
    "a byte": "A byte is a number from 0 to 255.",
    "a regular expression": "A regular expression is a pattern that describes a set of strings.",
    "a bug": "A bug is a mistake in a program.",
    "a test": "A test is code that checks that other code is right.",
    "an algorithm": "An algorithm is a list of steps that solve a problem.",
    "a compiler": "A compiler translates code into another language that a machine can run.",
    "an interpreter": "An interpreter runs code directly, step by step.",
    "a library": "A library is code that other programs can use.",
    "a prime number": "A prime number can only be divided by 1 and by itself.",
    "a token": "A token is a small piece of text, such as a word or a sign.",
    "a language model": "A language model predicts the next token of a text.",
    "a coroutine": "A coroutine is a function that can wait for others while it runs.",
    "a context manager": "A context manager sets something up for a with block and cleans up after it.",
    "an attribute": "An attribute is a value that belongs to an object.",
    "a property": "A property is a method that is read like an attribute.",
    "a constructor": "A constructor makes a new object of a class.",
    "a database": "A database stores data so that it can be searched quickly.",
    "a matrix": "A matrix is a table of numbers.",
    "a vector": "A vector is a list of numbers.",
    "recursion": "Recursion means that a function calls itself.",
    "inheritance": "Inheritance means that a class takes over the methods of another class.",
    "Python": "Python is a programming language that is easy to read.",
    "indentation": "Indentation is the space at the start of a line; in Python it marks a block.",
    "None": "None is the value that stands for nothing.",
    "True": "True is the boolean value of a condition that holds.",
    "self": "self is the object on which a method was called.",
    "JSON": "JSON is a text format for lists, dictionaries, strings and numbers.",
    "HTML": "HTML is the language in which web pages are written.",
    "HTTP": "HTTP is the protocol with which browsers ask for web pages.",
    "a URL": "A URL is the address of a page on the web.",
    "an email": "An email is a message that is sent over the internet.",
    "a computer": "A computer is a machine that runs programs.",
    "a program": "A program is a list of instructions for a computer.",
    "a number": "A number is a value with which one can compute, such as 3 or 2.5.",
    "a word": "A word is a piece of text between two spaces.",
}
ASK = ["What is {}?", "What is {} in Python?", "what is {}?", "Explain {}.", "Explain {} in one sentence.",
       "Define {}.",
       "Can you explain {}?", "Tell me what {} is.", "Do you know what {} is?", "What does {} mean?",
       "Please explain what {} is.", "Describe {} in a sentence."]  # fmt: skip

# Name and parameters, what it does, body. {a}, {b}: parameters.
SMALL = [
    ("fibonacci|fib|fibonacci_number", "n", "Return the n-th Fibonacci number",
     ["a, b = 0, 1", "for _ in range({a}):", "    a, b = b, a + b", "return a"]),
    ("factorial|fact", "n", "Return the factorial of n",
     ["result = 1", "for i in range(2, {a} + 1):", "    result *= i", "return result"]),
    ("is_prime|check_prime|prime", "n", "Return whether n is a prime number",
     ["if {a} < 2:", "    return False", "for i in range(2, int({a} ** 0.5) + 1):", "    if {a} % i == 0:",
      "        return False", "return True"]),
    ("gcd|greatest_common_divisor", "a, b", "Return the greatest common divisor of a and b",
     ["while {b}:", "    {a}, {b} = {b}, {a} % {b}", "return {a}"]),
    ("lcm|least_common_multiple", "a, b", "Return the least common multiple of a and b",
     ["x, y = {a}, {b}", "while y:", "    x, y = y, x % y", "return {a} * {b} // x"]),
    ("add|add_numbers|plus|sum_two", "a, b", "Add two numbers", ["return {a} + {b}"]),
    ("subtract|minus|difference", "a, b", "Subtract b from a", ["return {a} - {b}"]),
    ("multiply|times|product", "a, b", "Multiply two numbers", ["return {a} * {b}"]),
    ("divide|quotient", "a, b", "Divide a by b",
     ["if {b} == 0:", '    raise ValueError("division by zero")', "return {a} / {b}"]),
    ("square|squared", "x", "Return the square of x", ["return {a} * {a}"]),
    ("cube|cubed", "x", "Return the cube of x", ["return {a} ** 3"]),
    ("double|twice", "x", "Return twice x", ["return 2 * {a}"]),
    ("half|halve", "x", "Return half of x", ["return {a} / 2"]),
    ("power|exponentiate", "base, exponent", "Return base to the power of exponent", ["return {a} ** {b}"]),
    ("is_even|even", "n", "Return whether n is even", ["return {a} % 2 == 0"]),
    ("is_odd|odd", "n", "Return whether n is odd", ["return {a} % 2 == 1"]),
    ("is_positive|positive", "n", "Return whether n is positive", ["return {a} > 0"]),
    ("absolute|absolute_value", "x", "Return the absolute value of x",
     ["if {a} < 0:", "    return -{a}", "return {a}"]),
    ("maximum|largest|find_max|get_max", "values", "Return the largest value of a list",
     ["best = {a}[0]", "for value in {a}:", "    if value > best:", "        best = value", "return best"]),
    ("minimum|smallest|find_min|get_min", "values", "Return the smallest value of a list",
     ["best = {a}[0]", "for value in {a}:", "    if value < best:", "        best = value", "return best"]),
    ("mean|average", "numbers", "Return the mean of a list of numbers", ["return sum({a}) / len({a})"]),
    ("median", "numbers", "Return the median of a list of numbers",
     ["ordered = sorted({a})", "middle = len(ordered) // 2", "if len(ordered) % 2:", "    return ordered[middle]",
      "return (ordered[middle - 1] + ordered[middle]) / 2"]),
    ("total|sum_list|sum_all|sum_numbers", "numbers", "Return the sum of a list of numbers",
     ["result = 0", "for number in {a}:", "    result += number", "return result"]),
    ("reverse_string|reverse_text|reversed_string", "text", "Return a string in reverse order", ["return {a}[::-1]"]),
    ("reverse_list|reversed_items", "items", "Return a list in reverse order", ["return list(reversed({a}))"]),
    ("is_palindrome|palindrome", "text", "Return whether a text is a palindrome", ["return {a} == {a}[::-1]"]),
    ("count_vowels|vowels", "text", "Count the vowels of a text",
     ['return sum(1 for letter in {a}.lower() if letter in "aeiou")']),
    ("count_words|word_count", "text", "Count the words of a text", ["return len({a}.split())"]),
    ("count_lines|line_count", "text", "Count the lines of a text", ["return len({a}.splitlines())"]),
    ("count_letters|letter_counts", "text", "Count how often each letter occurs in a text",
     ["counts = {}", "for letter in {a}:", "    counts[letter] = counts.get(letter, 0) + 1", "return counts"]),
    ("count_items|count_values", "items", "Count how often each item occurs",
     ["counts = {}", "for item in {a}:", "    counts[item] = counts.get(item, 0) + 1", "return counts"]),
    ("bubble_sort|sort_list", "items", "Sort a list with bubble sort",
     ["for i in range(len({a})):", "    for j in range(len({a}) - 1 - i):", "        if {a}[j] > {a}[j + 1]:",
      "            {a}[j], {a}[j + 1] = {a}[j + 1], {a}[j]", "return {a}"]),
    ("insertion_sort", "items", "Sort a list with insertion sort",
     ["for i in range(1, len({a})):", "    item, j = {a}[i], i - 1", "    while j >= 0 and {a}[j] > item:",
      "        {a}[j + 1] = {a}[j]", "        j -= 1", "    {a}[j + 1] = item", "return {a}"]),
    ("selection_sort", "items", "Sort a list with selection sort",
     ["for i in range(len({a})):", "    smallest = min(range(i, len({a})), key={a}.__getitem__)",
      "    {a}[i], {a}[smallest] = {a}[smallest], {a}[i]", "return {a}"]),
    ("quick_sort|quicksort", "items", "Sort a list with quick sort",
     ["if len({a}) < 2:", "    return {a}", "pivot, rest = {a}[0], {a}[1:]",
      "left = [item for item in rest if item < pivot]", "right = [item for item in rest if item >= pivot]",
      "return {f}(left) + [pivot] + {f}(right)"]),
    ("linear_search|find_index|index_of", "items, target", "Return the index of target in a list, or -1",
     ["for index, item in enumerate({a}):", "    if item == {b}:", "        return index", "return -1"]),
    ("binary_search|search", "items, target", "Return the index of target in a sorted list, or -1",
     ["low, high = 0, len({a}) - 1", "while low <= high:", "    middle = (low + high) // 2",
      "    if {a}[middle] == {b}:", "        return middle", "    if {a}[middle] < {b}:", "        low = middle + 1",
      "    else:", "        high = middle - 1", "return -1"]),
    ("unique|remove_duplicates|distinct", "items", "Return the items of a list without duplicates",
     ["seen = set()", "result = []", "for item in {a}:", "    if item not in seen:", "        seen.add(item)",
      "        result.append(item)", "return result"]),
    ("flatten|flatten_list", "nested", "Flatten a list of lists", ["return [item for part in {a} for item in part]"]),
    ("chunk|chunks|split_list", "items, size", "Split a list into chunks of a size",
     ["return [{a}[i : i + {b}] for i in range(0, len({a}), {b})]"]),
    ("filter_even|even_numbers|get_evens", "numbers", "Return the even numbers of a list",
     ["return [number for number in {a} if number % 2 == 0]"]),
    ("filter_odd|odd_numbers", "numbers", "Return the odd numbers of a list",
     ["return [number for number in {a} if number % 2 == 1]"]),
    ("squares|square_all|square_list", "numbers", "Return the squares of a list of numbers",
     ["return [number * number for number in {a}]"]),
    ("first|first_item|head", "items", "Return the first item of a list", ["return {a}[0]"]),
    ("last|last_item", "items", "Return the last item of a list", ["return {a}[-1]"]),
    ("merge_dicts|combine_dicts|merge", "first, second", "Merge two dictionaries", ["return {{**{a}, **{b}}}"]),
    ("invert_dict|swap_keys|invert", "mapping", "Swap the keys and values of a dictionary",
     ["return {{value: key for key, value in {a}.items()}}"]),
    ("read_file|load_text|read_text", "path", "Read a file and return its text",
     ["with open({a}) as file:", "    return file.read()"]),
    ("write_file|save_text|write_text", "path, text", "Write a text to a file",
     ['with open({a}, "w") as file:', "    file.write({b})"]),
    ("read_lines|load_lines|get_lines", "path", "Return the lines of a file",
     ["with open({a}) as file:", "    return file.read().splitlines()"]),
    ("load_json|read_json", "path", "Load a JSON file",
     ["with open({a}) as file:", "    return json.load(file)"]),
    ("greet|say_hello|hello|greeting", "name", "Return a greeting for a name", ['return f"Hello, {{{a}}}!"']),
    ("celsius_to_fahrenheit|to_fahrenheit", "celsius", "Convert Celsius to Fahrenheit", ["return {a} * 9 / 5 + 32"]),
    ("fahrenheit_to_celsius|to_celsius", "fahrenheit", "Convert Fahrenheit to Celsius", ["return ({a} - 32) * 5 / 9"]),
    ("circle_area|area_of_circle", "radius", "Return the area of a circle", ["return 3.141592653589793 * {a} ** 2"]),
    ("rectangle_area|area", "width, height", "Return the area of a rectangle", ["return {a} * {b}"]),
    ("distance|difference_of", "a, b", "Return the distance between two numbers", ["return abs({a} - {b})"]),
    ("clamp|limit", "value, low, high", "Limit a value to a range", ["return max({b}, min({a}, {c}))"]),
    ("swap|swapped", "a, b", "Return two values in the other order", ["return {b}, {a}"]),
    ("digits|get_digits", "n", "Return the digits of a number", ["return [int(digit) for digit in str({a})]"]),
    ("sum_digits|digit_sum", "n", "Return the sum of the digits of a number",
     ["return sum(int(digit) for digit in str({a}))"]),
    ("is_leap_year|leap_year", "year", "Return whether a year is a leap year",
     ["return {a} % 4 == 0 and ({a} % 100 != 0 or {a} % 400 == 0)"]),
    ("fizzbuzz|fizz_buzz", "n", "Return the fizz buzz word of n",
     ["if {a} % 15 == 0:", '    return "FizzBuzz"', "if {a} % 3 == 0:", '    return "Fizz"', "if {a} % 5 == 0:",
      '    return "Buzz"', "return str({a})"]),
    ("title_case|capitalize_words", "text", "Capitalize the words of a text",
     ['return " ".join(word.capitalize() for word in {a}.split())']),
    ("shout|to_upper|upper_case", "text", "Return a text in upper case", ["return {a}.upper()"]),
    ("to_lower|lower_case", "text", "Return a text in lower case", ["return {a}.lower()"]),
    ("is_empty|empty", "items", "Return whether a list is empty", ["return len({a}) == 0"]),
    ("contains|has_item|includes", "items, target", "Return whether a list contains an item", ["return {b} in {a}"]),
    ("repeat|repeat_text", "text, times", "Repeat a text", ["return {a} * {b}"]),
    ("join_words|join_all", "words", "Join words with spaces", ['return " ".join({a})']),
    ("count_down|countdown", "n", "Count down from n to 1",
     ["while {a} > 0:", "    yield {a}", "    {a} -= 1"]),
    ("dot_product|dot", "a, b", "Return the dot product of two vectors",
     ["return sum(x * y for x, y in zip({a}, {b}))"]),
    ("transpose|transposed", "matrix", "Transpose a matrix", ["return [list(row) for row in zip(*{a})]"]),
    ("primes|primes_up_to|sieve", "n", "Return the prime numbers up to n",
     ["sieve = [True] * ({a} + 1)", "result = []", "for i in range(2, {a} + 1):", "    if sieve[i]:",
      "        result.append(i)", "        for j in range(i * i, {a} + 1, i):", "            sieve[j] = False",
      "return result"]),
    ("common_items|intersection", "first, second", "Return the items that two lists share",
     ["return [item for item in {a} if item in {b}]"]),
    ("longest_word|longest", "words", "Return the longest word", ["return max({a}, key=len)"]),
    ("to_binary|binary", "n", "Return a number in binary", ['return bin({a})[2:]']),
    ("say|print_message|show", "message", "Print a message", ["print({a})"]),
    ("safe_divide", "a, b", "Divide a by b, or return None for zero",
     ["try:", "    return {a} / {b}", "except ZeroDivisionError:", "    return None"]),
]  # fmt: skip
PARAMETERS = {"n": "n number num x value", "x": "x value number n", "a": "a x left first m", "b": "b y right second n",
              "items": "items values data elements sequence lst array", "text": "text string s word line",
              "numbers": "numbers values nums data xs", "values": "values numbers items data"}  # fmt: skip
WRITE = [
    "Write a function `{name}({args})` that does this: {doc}.", "Write a Python function `{name}`. {doc}.",
    "Write a Python function called {name}. {doc}.", "Write a function named `{name}`.", "Write `{name}({args})`.",
    "Implement `{name}({args})`.", "Implement {name} in Python.", "Define a function `{name}`. {doc}.",
    "def {name}({args}):", "def {name}({args}):", "def {name}({args}):", "Continue this code:\ndef {name}({args}):",
    'def {name}({args}):\n    """{doc}."""', "Please write the function {name}({args}).",
    "Complete the function `{name}`:\n```python\ndef {name}({args}):\n```", "Can you write a function {name}?",
    "I need a Python function `{name}` with the arguments {args}. {doc}.",
    "Write the Python function `{name}({args})`.",
    "{doc}. Call the function `{name}`.", "write a function {name} in python", "Give me a function called `{name}`.",
]  # fmt: skip


def talk(rng: random.Random) -> Pair:
    """A greeting, a question about the model, thanks, or a name."""
    kind = rng.choice(["hello", "hello", "who", "who", "who", "can", "can", "how", "thanks", "bye", "other", "other",
                       "named", "yes"])  # fmt: skip
    hello, end = rng.choice(HELLO), rng.choice(["!", ".", ",", "! "])
    if kind == "hello":
        return Pair(hello + rng.choice(["", "!", ".", " :)"]), rng.choice(["Hello! ", "Hi! "]) + "How can I help you?")
    if kind == "other":
        return Pair(*rng.choice(OTHER))
    if kind == "named":
        asked, reply = rng.choice(NAMED)
        name = rng.choice(NAMES)
        return Pair(asked.format(name), reply.format(name))
    table = {"who": (WHO, WHO_REPLIES), "can": (CAN, CAN_REPLIES), "how": (HOW, HOW_REPLIES), "yes": (YES, YES_REPLIES),
             "thanks": (THANKS, THANKS_REPLIES), "bye": (BYE, BYE_REPLIES)}  # fmt: skip
    asked, replies = table[kind]
    question, reply = rng.choice(asked), rng.choice(replies)
    if kind in ("who", "can", "how") and rng.random() < 0.6:
        return Pair(f"{hello}{end.strip()} {question}", "Hello! " + reply)
    return Pair(question, reply)


def definition(rng: random.Random) -> Pair:
    word, text = rng.choice(list(DEFINITIONS.items()))
    if rng.random() < 0.15:
        word = word.removeprefix("a ").removeprefix("an ")
    return Pair(rng.choice(ASK).format(word), text)


def small_function(rng: random.Random) -> Pair:
    """One of the functions above under one of its names, or another name, and with other parameters."""
    names, parameters, doc, body = rng.choice(SMALL)
    name = rng.choice(names.split("|"))
    old = parameters.split(", ")
    new = [rng.choice(PARAMETERS.get(word, word).split()) for word in old] if rng.random() < 0.5 else old
    if len(set(new)) < len(new) or ("fib" in names and new[0] in "ab"):
        new = old
    if name == new[0]:
        new = old
    words = dict(zip("abc", new, strict=False), f=name)
    lines = [line.replace("counts = {}", "counts = {{}}").format(**words) for line in body]
    args = ", ".join(new)
    asked = rng.choice(WRITE).format(name=name, args=args, doc=doc)
    documented = '"""' in asked or rng.random() < 0.3
    head = [f"def {name}({args}):"] + ([f'    """{doc}."""'] if documented else [])
    return Pair(asked, fenced("\n".join(head + ["    " + line for line in lines])))
